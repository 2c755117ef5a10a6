"""Imports between our modules point one way, as the map of the house in the README draws them."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('mixcon_jax', 'kernels_pallas', 'launch', 'experiments')

# Whatever may be imported by everyone, without JAX: the configuration, and what it is read with.
FOUNDATION = {f'mixcon_jax.{name}' for name in ('errors', 'parsing', 'host', 'options', 'checks', 'units')}
CONFIGURATION = {
    *FOUNDATION, 'mixcon_jax.config', 'mixcon_jax.parallel.axes', 'mixcon_jax.models.kinds',
    'mixcon_jax.models.declared', 'mixcon_jax.models.pattern', 'mixcon_jax.models.reported',
    'mixcon_jax.models.mixers', 'mixcon_jax.models.ffns', 'mixcon_jax.data',
}  # fmt: skip
ARRAYS = {
    'kernels_pallas',
    'mixcon_jax.trees',
    'mixcon_jax.parallel',
    'mixcon_jax.models',
    'mixcon_jax.loss',
    *CONFIGURATION,
}
DERIVED = {f'mixcon_jax.{name}' for name in ('derived', 'runs', 'step', 'optim', 'xla_flags')} | ARRAYS
# What each part may reach, by its own imports and through those of others. One that is not named may reach all but TOP.
REACHES = {
    'kernels_pallas': {'kernels_pallas'},
    'mixcon_jax.errors': set(),
    'mixcon_jax.options': set(),
    'mixcon_jax.parsing': set(),
    'mixcon_jax.units': set(),
    'mixcon_jax.trees': set(),
    'mixcon_jax.host': {'mixcon_jax.errors', 'mixcon_jax.host'},
    'mixcon_jax.checks': FOUNDATION,
    'mixcon_jax.data': {'mixcon_jax.data', *FOUNDATION},
    'mixcon_jax.config': CONFIGURATION,
    'mixcon_jax.parallel': {'kernels_pallas', 'mixcon_jax.trees', 'mixcon_jax.parallel', *FOUNDATION},
    'mixcon_jax.planning': {'mixcon_jax.planning', *FOUNDATION},
    # Planning counts; what lowers the true steps for it stands apart.
    'mixcon_jax.planner': {
        'mixcon_jax.planner',
        'mixcon_jax.planning',
        'mixcon_jax.reports',
        'mixcon_jax.inference',
        'mixcon_jax.runs',
        'mixcon_jax.step',
        'mixcon_jax.optim',
        'mixcon_jax.xla_flags',
        *ARRAYS,
    },
    'mixcon_jax.models': {
        'kernels_pallas',
        'mixcon_jax.models',
        'mixcon_jax.parallel',
        'mixcon_jax.trees',
        *FOUNDATION,
    },
    'mixcon_jax.loss': ARRAYS - {'mixcon_jax.models'},
    'mixcon_jax.optim': {'mixcon_jax.trees', 'mixcon_jax.options'},
    'mixcon_jax.function': CONFIGURATION,
    'mixcon_jax.step': {'mixcon_jax.optim', 'mixcon_jax.xla_flags', *ARRAYS},
    'mixcon_jax.runs': {'mixcon_jax.runs', 'mixcon_jax.trees', *CONFIGURATION},
    'mixcon_jax.derived': DERIVED,
    'mixcon_jax.distillation': {
        'mixcon_jax.distillation',
        'mixcon_jax.evaluate',
        'mixcon_jax.inference',
        *DERIVED,
    },
    'mixcon_jax.interop': {'mixcon_jax.interop', 'mixcon_jax.function', *DERIVED},
    'mixcon_jax.inference': {'mixcon_jax.inference', 'mixcon_jax.runs', *ARRAYS},
    'mixcon_jax.analyses': {
        'mixcon_jax.analyses',
        'mixcon_jax.evaluate',
        'mixcon_jax.inference',
        'mixcon_jax.runs',
        'mixcon_jax.step',
        'mixcon_jax.optim',
        'mixcon_jax.xla_flags',
        *ARRAYS,
    },
    'mixcon_jax.reports': {'mixcon_jax.reports', 'mixcon_jax.runs', *ARRAYS},
    'mixcon_jax.watching': {'mixcon_jax.watching', 'mixcon_jax.runs', 'mixcon_jax.trees', *CONFIGURATION},
}
# What starts runs; only launchers and one another may import it.
TOP = {'mixcon_jax.train', 'mixcon_jax.cli', 'mixcon_jax.commands', 'mixcon_jax.__main__', 'launch'}


def modules() -> dict[str, pathlib.Path]:
    """The dotted name of every module of ours, with its file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


MODULES = modules()


@functools.cache
def imports(name: str, *, lazy: bool = True) -> set[str]:
    """Every module that module `name` imports, as dotted names; inside functions too when `lazy`.

    `from a import b` counts as `a.b` when that is a module of ours and as `a` otherwise.
    """
    tree = ast.parse(MODULES[name].read_text())
    nodes = list(ast.walk(tree))
    if not lazy:
        inside = {
            child
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if node not in inside]
    is_package = MODULES[name].name == '__init__.py'
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = name.split('.')
                parents = parents[: len(parents) - node.level + is_package]
                base = '.'.join([*parents, base] if base else parents)
            for alias in node.names:
                full = f'{base}.{alias.name}'
                found.add(full if full in MODULES else base)
    return found


@functools.cache
def ours(name: str) -> set[str]:
    return {other for other in imports(name) if other.split('.')[0] in PACKAGES}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + '.')


def any_within(name: str, packages: set[str]) -> bool:
    return any(within(name, package) for package in packages)


@pytest.mark.parametrize('name', [m for m in MODULES if within(m, 'kernels_pallas')])
def test_kernels_import_only_jax(name: str):
    """Kernels stand alone: JAX, NumPy and annotations. Kernel libraries only lazily, only in <kernel>/tokamax.py."""
    allowed = {'jax', 'jaxlib', 'numpy', 'jaxtyping', 'kernels_pallas', *sys.stdlib_module_names}
    foreign = {other.split('.')[0] for other in imports(name)} - allowed
    if name.endswith('.tokamax'):
        assert not {other.split('.')[0] for other in imports(name, lazy=False)} - allowed
        foreign -= {'tokamax'}
    assert not foreign, f'{name} imports {sorted(foreign)}'


def reached(name: str) -> set[str]:
    """Every module of ours that a module imports, and what those import, inside functions too."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        found = {other for other in ours(todo.pop()) if other in MODULES} - seen
        seen |= found
        todo += found
    return seen


@pytest.mark.parametrize('part', REACHES)
def test_a_part_reaches_no_more_than_it_may(part: str):
    """Not through others either: what arrows allow one by one may lead anywhere together."""
    wrong = {
        f'{name} reaches {other}'
        for name in MODULES
        if within(name, part)
        for other in reached(name)
        if not any_within(other, REACHES[part])
    }
    assert not wrong, sorted(wrong)[:5]


@pytest.mark.parametrize('name', [m for m in MODULES if not any_within(m, TOP)])
def test_nothing_imports_what_starts_runs(name: str):
    wrong = {other for other in ours(name) if any_within(other, TOP)}
    assert not wrong, f'{name} imports {sorted(wrong)}'


def test_only_the_command_line_and_launchers_import_train():
    importers = {name for name in MODULES if 'mixcon_jax.train' in ours(name)}
    assert all(any_within(name, TOP) for name in importers), importers


@pytest.mark.parametrize('name', [m for m in MODULES if within(m, 'experiments')])
def test_experiments_are_data(name: str):
    """An experiment file only describes: reading it must start nothing and load no accelerator."""
    data = {'mixcon_jax.models.presets', 'mixcon_jax.models.sizes', 'mixcon_jax.models.accounting'}
    allowed = {'experiments', *data, *CONFIGURATION}
    assert all(any_within(other, allowed) for other in ours(name)), ours(name)
    assert 'mixcon_jax.models.accounting' not in imports(name, lazy=False), 'only sweep() may count parameters'
    assert not {other for other in imports(name) if other.split('.')[0] in ('jax', 'flax', 'optax', 'orbax')}


@pytest.mark.parametrize('start', ['config', 'models.pattern', 'runs.run', 'runs.workdir', 'watching.follow'])
def test_what_answers_at_once_loads_neither_jax_nor_numpy(start):
    """What it imports when it is imported, and what that imports, with the packages around them."""
    seen: set[str] = set()
    todo = [f'mixcon_jax.{start}']
    while todo:
        name = todo.pop()
        for other in imports(name, lazy=False):
            assert other.split('.')[0] not in ('jax', 'flax', 'optax', 'orbax', 'numpy', 'kernels_pallas'), name
            parts = other.split('.')
            todo += {'.'.join(parts[:size]) for size in range(1, len(parts) + 1)} & MODULES.keys() - seen
        seen.add(name)
    assert len(seen) > 3
    if start == 'config':
        assert {'mixcon_jax.checks', 'mixcon_jax.models.kinds', 'mixcon_jax.models.mixers'} <= seen


@pytest.mark.parametrize('package', ['mixcon_jax', 'kernels_pallas', 'launch', 'tests'])
def test_no_file_is_longer_than_can_be_read_at_once(package: str):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / package).rglob('*.py')}
    assert lines and not {path.relative_to(ROOT).as_posix(): count for path, count in lines.items() if count > 400}


def test_imports_have_no_circle():
    """Depth-first search over the imports, those inside functions included; a package stands for its __init__.py."""
    graph = {name: {other for other in ours(name) if other in MODULES and other != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, ' -> '.join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
