"""What `mkdocs build` adds to the pages of docs/: a reference written from the code, and equations as MathML.

None of it is committed, so none of it can be out of date. `pages()` needs no MkDocs; tests/test_docs.py uses it too.
"""

import argparse
import ast
import functools
import html
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels_pallas import cards, verify  # noqa: E402  after the path
from mixcon_jax.cli import build_parser  # noqa: E402
from mixcon_jax.config import table  # noqa: E402
from mixcon_jax.options import Option  # noqa: E402
from mixcon_jax.xla_flags import FLAGS  # noqa: E402

# Page of the API reference: its title, and its modules; a * stands for all modules there.
API = {
    'config': ('Configuration', [f'mixcon_jax.{name}' for name in ('config', 'options', 'checks', 'errors')]),
    'training': (
        'Training',
        [f'mixcon_jax.{name}' for name in ('train', 'step', 'loss', 'optim', 'xla_flags')],
    ),
    'devices': ('Devices', ['mixcon_jax.parallel.*']),
    'runs': ('Run directories', ['mixcon_jax.runs.*']),
    'inference': (
        'Inference',
        ['mixcon_jax.inference.*', 'mixcon_jax.evaluate', 'mixcon_jax.analyses.*', 'mixcon_jax.interop.*'],
    ),
    'reports': ('Reports', ['mixcon_jax.reports.*', 'mixcon_jax.watching.watch']),
    'models': (
        'Models',
        [
            f'mixcon_jax.models.{name}'
            for name in (
                *('layer', 'decoder', 'block', 'pattern', 'kinds', 'layers', 'context'),
                *('published', 'reported', 'presets', 'accounting'),
            )
        ],
    ),
    'mixers': ('Mixers and FFNs', ['mixcon_jax.models.mixers.*', 'mixcon_jax.models.ffns.*']),
    'data': ('Data', ['mixcon_jax.data.*']),
    'kernels': ('Kernels', ['kernels_pallas.*.api', 'kernels_pallas.*.context_parallel']),
    'planning': ('Planning', ['mixcon_jax.planning.*']),
    'launch': ('Launchers', ['launch.sweep.*', 'launch.local', 'launch.processes']),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pages written from the code
# ---------------------------------------------------------------------------------------------------------------------
def pages() -> dict[str, str]:
    """Returns ``{path below docs/: Markdown}`` of every page that is written at build time."""
    found = {
        'reference/options.md': options_page(),
        'reference/commands.md': commands_page(),
        'reference/xla-flags.md': flags_page(),
        'reference/experiments.md': experiments_page(),
        'kernels/verified.md': verified_page(),
    }
    for name, (title, modules) in API.items():
        found[f'reference/api/{name}.md'] = api_page(title, modules)
    for path in sorted((ROOT / 'kernels_pallas').rglob('README.md')):
        found[f'kernels/{path.relative_to(ROOT / "kernels_pallas")}'] = path.read_text()
    return found


def options_page() -> str:
    """One table a group of options."""
    lines = [
        '# Configuration',
        'Every option with its default. A group has a heading of its own; `0`, `-1` or an empty value often stands for '
        '"derive it", which `mixcon config` then spells out. Set options in an experiment file, '
        '`config.model.dim = 256`, or on the command line, `--config.model.dim=256`; a tuple is `a,b,c` there.',
    ]
    for prefix, options in groups(table()):
        lines += ['', f'## {prefix or "The run"} {{ #{prefix or "run"} }}', '']
        lines += ['| option | default | meaning | values |', '|---|---|---|---|']
        for name, option in options.items():
            key = f'{prefix}.{name}' if prefix else name
            cells = (f'`{key}`{{ #{key} }}', f'`{option.default!r}`', option.meaning, values(option))
            lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
    return '\n'.join(lines) + '\n'


def groups(options: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, dict[str, Option]]]:
    """Yields every group that has options of its own, by its dotted name, outer ones first."""
    leaves = {name: node for name, node in options.items() if isinstance(node, Option)}
    if leaves:
        yield prefix, leaves
    for name, node in options.items():
        if not isinstance(node, Option):
            yield from groups(node, f'{prefix}.{name}' if prefix else name)


def values(option: Option) -> str:
    """The type of an option and what is allowed, in words."""
    kind = type(option.default).__name__
    kind += f' of {option.element.__name__}' if option.element else ''
    words = option.check.words if option.check else ''
    if words.startswith('one of '):
        return ', '.join(f'`{choice or repr("")}`' for choice in words.removeprefix('one of ').split(', '))
    return f'{kind}, {words}' if words else kind


def commands_page() -> str:
    """The help text of every command."""
    lines = [
        '# Command line',
        '`mixcon` exits with 0 when done; [other codes](../run-directory.md#exit-codes) say why not.',
    ]
    parsers = list(leaf_parsers(build_parser()))
    for path in sorted((ROOT / 'launch').rglob('*.py')):
        if 'def build_parser(' in path.read_text():
            module = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
            parsers.append(importlib.import_module(module).build_parser())
    for parser in parsers:
        lines += ['', f'## {parser.prog}', '', '```text', help_text(parser), '```']
    return '\n'.join(lines) + '\n'


def leaf_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields the parsers of commands that have no commands of their own."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield parser
    for action in inner:
        for child in action.choices.values():
            yield from leaf_parsers(child)


def help_text(parser: argparse.ArgumentParser) -> str:
    """A parser's help, 80 columns wide whatever the terminal."""
    parser.formatter_class = functools.partial(parser.formatter_class, width=80)
    parser.color = False  # Python 3.14
    return parser.format_help().strip()


def flags_page() -> str:
    """The flags of XLA that training may want."""
    lines = [
        '# Flags of XLA',
        "For `train.xla_flags`, each with a value to try in place of XLA's own. None but the first is set by default: "
        'what they bring hangs on model, mesh and network, and **no GPU of ours has measured them**. Names and values '
        'are those of the pinned XLA: `tests/test_xla_flags.py` compiles a program with each, and a train step for '
        'eight absent H100s with all at once. Flags that older guides recommend for pipelining exchanges '
        '(`xla_gpu_enable_pipelined_all_gather` and its kin) are missing here because this XLA refuses them.',
        '',
        '| flag | value | worth a try on | what it does |',
        '|---|---|---|---|',
    ]
    lines += [f'| `{name}` | `{flag.value}` | {flag.on} | {flag.meaning} |' for name, flag in FLAGS.items()]
    return '\n'.join(lines) + '\n'


def experiments_page() -> str:
    """What the experiment files say about themselves."""
    lines = [
        '# Experiments',
        'The files in `experiments/`, in their own words. `mixcon train --config FILE --workdir DIR` runs one.',
    ]
    for path in sorted((ROOT / 'experiments').rglob('*.py')):
        if path.name != '__init__.py':
            tree = ast.parse(path.read_text())
            swept = any(isinstance(node, ast.FunctionDef) and node.name == 'sweep' for node in tree.body)
            lines += ['', f'## {path.relative_to(ROOT)}', '', ast.get_docstring(tree) or '']
            lines += ['', 'It defines a [sweep](../howto-sweep.md).'] if swept else []
    return '\n'.join(lines) + '\n'


def verified_page() -> str:
    """What GPUs have shown of every variant of every kernel, from the cards beside the kernels."""
    lines = [
        '# What GPUs have shown',
        'From the [verification cards](README.md#which-kernels-run) beside the kernels. A kernel runs on GPUs '
        'of the major compute capability of one that has verified it, while its sources are those that were verified; '
        'what is `stale` has changed since. `implementation` names a kernel all the same.',
        '',
        '| kernel | variant | state | GPU | driver, JAX | date | cases | largest relative error |',
        '|---|---|---|---|---|---|---|---|',
    ]
    times = ['## Times', '', f'Milliseconds of a call, and how often that is [the floor](README.md). {TIMES}', '']
    times += ['| kernel | sizes | GPU | forward | of the floor | XLA | and backward | of the floor | XLA |']
    times += ['|---|---|---|---|---|---|---|---|---|']
    for part, found in verify.standing():
        if not found:
            lines.append(f'| `{part.kernel}` | {part.variant} | never run | | | | | |')
        for card in found:
            gpu = f'{card.device} ({card.compute_capability})'
            error = f'{max(card.cases.values()):.1e}' if card.cases else ''
            cells = [f'`{part.kernel}`', part.variant, card.state, gpu, f'{card.driver}, {card.jax}', card.date]
            lines.append(f'| {" | ".join([*cells, str(len(card.cases)), error])} |')
            times += [_times(card, sizes, figures) for sizes, figures in card.times.items()]
    return '\n'.join([*lines, '', *times]) + '\n'


TIMES = 'Calls are queued, so that the host does not count; the median of five turns.'


def _times(card: cards.Card, sizes: str, figures: dict[str, float]) -> str:
    """A row of the table of times."""
    cells = [f'`{card.kernel}`', sizes, card.device]
    for name in ('forward', 'both'):
        ratio = figures[name] / figures[f'{name}_floor']
        other = figures.get(f'xla_{name}')
        cells += [f'{figures[name]:.3g}', f'{ratio:.2f}', f'{other:.3g}' if other else '–']
    return f'| {" | ".join(cells)} |'


def api_page(title: str, names: list[str]) -> str:
    """What mkdocstrings fills in: one directive a module."""
    return '\n\n'.join([f'# {title}', *(f'::: {module}' for name in names for module in modules(name))]) + '\n'


def modules(name: str) -> list[str]:
    """The modules that a name with a ``*`` stands for, without packages' ``__init__``."""
    found = sorted(ROOT.glob(f'{name.replace(".", "/")}.py'))
    if not found:
        raise FileNotFoundError(f'docs/hooks.py: there is no module {name}')
    return ['.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in found if path.stem != '__init__']


def navigation(nav: list[Any]) -> list[Any]:
    """Replaces ``folder/*`` by the generated pages of that folder."""
    if isinstance(nav, str) and nav.endswith('/*'):
        return [path for path in pages() if path.startswith(nav[:-1])]
    if isinstance(nav, list):
        return [navigation(entry) for entry in nav]
    return {title: navigation(entry) for title, entry in nav.items()} if isinstance(nav, dict) else nav


# ---------------------------------------------------------------------------------------------------------------------
# What MkDocs calls
# ---------------------------------------------------------------------------------------------------------------------
def on_config(config):
    config.nav = navigation(config.nav)


def on_files(files, config):
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))


def on_page_content(content, page, config, files):
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda match: mathml(html.unescape(match[2]), match[1] == 'div', page.file.src_uri),
        content,
        flags=re.DOTALL,
    )


def mathml(tex: str, display: bool, where: str) -> str:
    """An equation as every current browser shows it by itself.

    Raises:
      PluginError: the equation has a command that was not understood.
    """
    from latex2mathml.converter import convert
    from mkdocs.exceptions import PluginError

    text = convert(tex.strip(), display='block' if display else 'inline')
    if '\\' in text or '<mi>&</mi>' in text:
        raise PluginError(f'{where}: equation {tex!r} is not understood; see docs/hooks.py')
    return re.sub(r'<mo>([A-Za-z]+)</mo>', r'<mi>\1</mi>', text)  # names of functions, without an operator's spaces
