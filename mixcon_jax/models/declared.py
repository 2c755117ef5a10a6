"""What a layer's class declares: its options, its statistics and its checks, from the class or from its source alone.

Reading a configuration must not load JAX, which every layer's file does. So declarations are read from the source of
the class, as setuptools reads ``attr: package.__version__``: of the class's body only ``OPTIONS``, ``STATISTICS``,
``check`` and ``check_split`` are run, and of its file only the imports and the literals that these name. Base classes
are followed by their imports.
"""

import ast
import builtins
import dataclasses
import dis
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mixcon_jax.errors import ConfigError
from mixcon_jax.options import Option, Statistic

CONTRACT = 'mixcon_jax.models.layer.Layer'
DESCRIBES = ('OPTIONS', 'STATISTICS', 'check', 'check_split')  # the members of a class that describe it
READABLE = ('mixcon_jax.options', 'mixcon_jax.checks')  # what a description may import, beside the standard library


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What one class says in its own body, without that of its bases; ``Layer`` tells what each is."""

    owner: str  # dotted path of the class
    options: Mapping[str, Mapping[str, Option]]
    statistics: Mapping[str, Statistic]
    check: Callable[[Any], None] | None
    check_split: Callable[[Any, Mapping[str, int]], None] | None


def of_class(kind: type) -> tuple[Declaration, ...]:
    """The declarations of an imported class and its bases."""
    return tuple(
        _declaration(f'{each.__module__}.{each.__qualname__}', vars(each))
        for each in reversed(kind.__mro__)
        if set(DESCRIBES) & vars(each).keys()
    )


@functools.cache
def of_source(path: str) -> tuple[Declaration, ...]:
    """The same of a class that is not imported, by its dotted path."""
    module, _, name = path.rpartition('.')
    file, tree = _parse(module, path)
    statement = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if statement is None:
        if (elsewhere := _imported(tree, name)) is None:
            raise ConfigError(f'{file} defines no class {name}, which is registered as a kind of layer')
        return of_source(elsewhere)
    if path == CONTRACT:
        return (_declaration(path, {}),)
    found: dict[str, Declaration] = {}
    for base in reversed(statement.bases):  # as in the reversed order of resolution
        found |= {part.owner: part for part in of_source(_path_of(base, tree, module, file))}
    if members := _run(statement, tree, file):
        found[path] = _declaration(path, members)
    return tuple(found.values())


def _declaration(owner: str, members: Mapping[str, Any]) -> Declaration:
    checks = [members.get(name) if owner != CONTRACT else None for name in ('check', 'check_split')]
    checks = [check.__func__ if isinstance(check, staticmethod) else check for check in checks]
    return Declaration(owner, members.get('OPTIONS', {}), members.get('STATISTICS', {}), *checks)


def _parse(module: str, path: str) -> tuple[str, ast.Module]:
    """The file of a module and what it says; no more than the packages that hold it is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f'the layer {path} is registered, but {error}') from error
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError(f'the layer {path} is registered, but there is no module {module}')
    with open(spec.origin, 'rb') as file:
        return spec.origin, ast.parse(file.read(), spec.origin)


def _path_of(base: ast.expr, tree: ast.Module, module: str, file: str) -> str:
    """The dotted path of a base class."""
    if isinstance(base, ast.Name):
        if any(isinstance(node, ast.ClassDef) and node.name == base.id for node in tree.body):
            return f'{module}.{base.id}'
        if (path := _imported(tree, base.id)) is not None:
            return path
    raise ConfigError(
        f'{file}, line {base.lineno}: the base class {ast.unparse(base)} of a layer cannot be followed;'
        ' import it with `from MODULE import CLASS`'
    )


def _imported(tree: ast.Module, name: str) -> str | None:
    """The dotted path of what a file imports by that name."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return f'{node.module}.{alias.name}'
    return None


def _run(statement: ast.ClassDef, tree: ast.Module, file: str) -> dict[str, Any]:
    """Runs what describes a class, and that alone; returns those of its members that ``DESCRIBES`` names."""
    described = [member for node in statement.body if (member := _member(node, file)) is not None]
    code = _compiled(described, file)
    bound = {name for node in described for name in _binds(node)}
    needed = dict.fromkeys(name for name in _globals(code) if name not in bound and not hasattr(builtins, name))
    given = [node for node in tree.body if _is_readable(node)]
    have = {name for node in given for name in _binds(node)}
    for name in needed:
        if name not in have:
            raise ConfigError(
                f'{file}, line {statement.lineno}: what describes {statement.name} needs {name!r}, but is read without'
                f' its file; it may use literals, the standard library and {", ".join(READABLE)}'
            )
    values: dict[str, Any] = {}
    exec(_compiled([node for node in given if needed.keys() & set(_binds(node))], file), values)
    exec(code, values)
    return {name: values[name] for name in bound}


def _member(node: ast.stmt, file: str) -> ast.stmt | None:
    """A statement of a class's body that describes it, without annotations and decorators; None for any other."""
    match node:
        case ast.Assign(targets=[ast.Name(id='OPTIONS' | 'STATISTICS')]):
            return node
        case ast.AnnAssign(target=ast.Name(id='OPTIONS' | 'STATISTICS') as target, value=ast.expr() as value):
            return ast.copy_location(ast.Assign([target], value), node)
        case ast.FunctionDef(name='check' | 'check_split'):
            if [ast.unparse(decorator) for decorator in node.decorator_list] != ['staticmethod']:
                raise ConfigError(f'{file}, line {node.lineno}: {node.name}() of a layer must be a @staticmethod')
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                argument.annotation = None
            node.decorator_list, node.returns = [], None
            return node
    return None


def _is_readable(node: ast.stmt) -> bool:
    """Whether a statement of a layer's file may be run to describe it."""
    match node:
        case ast.ImportFrom(module=str(module), level=0):
            return module in READABLE or module.split('.')[0] in sys.stdlib_module_names
        case ast.Import():
            return all(alias.name.split('.')[0] in sys.stdlib_module_names for alias in node.names)
        case ast.Assign(targets=[ast.Name()], value=value):
            try:
                ast.literal_eval(value)
            except ValueError:
                return False
            return True
    return False


def _binds(node: ast.stmt) -> Iterator[str]:
    """The names that a statement of ``_member`` or ``_is_readable`` defines."""
    match node:
        case ast.Import() | ast.ImportFrom():
            yield from ((alias.asname or alias.name).split('.')[0] for alias in node.names)
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.FunctionDef(name=name):
            yield name


def _compiled(statements: list[ast.stmt], file: str) -> types.CodeType:
    return compile(ast.fix_missing_locations(ast.Module(statements, [])), file, 'exec')


def _globals(code: types.CodeType) -> Iterator[str]:
    """The global names that code reads, its functions' included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ('LOAD_NAME', 'LOAD_GLOBAL'):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)
