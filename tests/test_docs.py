"""The documentation: pages are listed, links lead somewhere, commands parse and, in the slow part, run as printed.

docs/testing.md describes the comments that steer this. That equations, references and links also hold in the built
site is for `mkdocs build --strict` to say, which `make test` runs.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
import yaml

from launch import member
from mixcon_jax import config as configs
from mixcon_jax.cli import build_parser, parse_overrides
from mixcon_jax.config import leaves

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob('*.md'))}
SCRIPTED = {f'docs/{name}': text for name, text in PAGES.items()} | {'README.md': (ROOT / 'README.md').read_text()}
RUN = [name for name in SCRIPTED if re.match(r'docs/(tutorial|howto-.*)\.md$', name)]
NOT_COPIED = ('.git', '.venv', '.cache', '.*_cache', '.hypothesis', '*.egg-info', 'runs', 'site')  # of the top alone

PIECE = re.compile(
    r'^<!-- test: (?P<comment>.*?)\s*-->$'
    r'|^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)


def load_hooks():
    spec = importlib.util.spec_from_file_location('docs_hooks', DOCS / 'hooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()
GENERATED = hooks.pages()


# ---------------------------------------------------------------------------------------------------------------------
# What is on a page
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Step:
    """Something that a page asks its reader to do.

    Attributes:
      where: page and line.
      text: a shell script, or the content of a file.
      path: where the file goes; empty for a script.
      shown: the text as it stands on the page.
      skipped: not run by the slow test.
    """

    where: str
    text: str
    path: str = ''
    shown: str = ''
    skipped: bool = False


def steps(name: str) -> Iterator[Step]:
    """Yields the scripts and files of a page of SCRIPTED, with what the comments before them change."""
    skipped, changes = False, []
    for piece in PIECE.finditer(SCRIPTED[name]):
        where = f'{name}:{SCRIPTED[name].count(chr(10), 0, piece.start()) + 1}'
        if (comment := piece['comment']) is not None:
            if comment.startswith('run '):
                yield Step(where, comment.removeprefix('run '))
            elif comment.startswith('skip '):
                skipped = True
            else:
                assert ' -> ' in comment, f'{where}: {comment!r} is not "skip REASON", "run COMMANDS" or "OLD -> NEW"'
                changes.append(comment.split(' -> ', 1))
            continue
        shown = text = textwrap.dedent(piece['text'])
        for old, new in changes:
            assert old in text, f'{where}: {old!r} does not occur in this block'
            text = text.replace(old, new)
        if piece['language'] == 'bash' or piece['title']:
            yield Step(where, text, piece['title'] or '', shown, skipped)
        else:
            assert not skipped and not changes, f'{where}: a comment before a block that is not run'
        skipped, changes = False, []


def commands(script: str) -> Iterator[list[str]]:
    """Yields the words of every simple command of a shell script, as far as documentation goes."""
    script = re.sub(r"<<'?(\w+)'?\n.*?^\1$", '', script.replace('\\\n', ' '), flags=re.MULTILINE | re.DOTALL)
    line = ''
    for part in script.splitlines():
        line += part
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation goes on in the next line
            line += '\n'
            continue
        line = ''
        command: list[str] = []
        redirected = False
        for word in [*words, ';']:
            if redirected:
                redirected = False
            elif word in ('>', '>>', '<'):
                redirected = True
                if command and command[-1] in ('1', '2'):
                    command.pop()
            elif set(word) <= set('();<>|&'):
                yield from filter(None, [bare(command)])
                command = []
            else:
                command.append(word)


def bare(command: list[str]) -> list[str]:
    """Takes away what stands before a command's name: keywords, assignments, wrappers with their arguments."""
    wrappers = {'until', 'while', 'if', 'do', 'then', '!', 'time', 'timeout', 'nohup', 'nice', 'env', 'exec'}
    for i, word in enumerate(command):
        if word not in wrappers and not re.match(r'-|\d+[smh]?$|\w+=', word):
            return command[i:]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Navigation and links
# ---------------------------------------------------------------------------------------------------------------------
def flatten(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in flatten(entry)]


def test_navigation_lists_every_page_once():
    nav = flatten(hooks.navigation(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']))
    assert sorted(nav) == sorted(PAGES | GENERATED)


def test_index_links_every_page():
    linked = {target.split('#')[0] for target in links(PAGES['index.md'])}
    assert PAGES.keys() - {'index.md'} <= linked
    assert {name for name in GENERATED if name.startswith('reference/')} <= linked


def links(text: str) -> list[str]:
    """Targets of the links that lie within the documentation."""
    text = re.sub(r'^( *)```.*?^\1```$|`[^`\n]*`', '', text, flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'\w+:', target)]


def anchors(text: str) -> set[str]:
    """Ids of the headings, as MkDocs makes them, and those that are given."""
    found = set(re.findall(r'\{ #(\S+) \}', text))
    for heading in re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S), re.MULTILINE):
        plain = unicodedata.normalize('NFKD', heading).encode('ascii', 'ignore').decode()
        found.add(re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', plain).strip().lower()))
    return found


def broken(name: str, text: str, pages: dict[str, str], exists) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for target in links(text):
        path, _, anchor = target.partition('#')
        page = os.path.normpath(PurePosixPath(name).parent / path) if path else name
        if not (page in pages or exists(page)) or (anchor and anchor not in anchors(pages.get(page, ''))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_somewhere(name):
    assert not broken(name, PAGES[name], PAGES | GENERATED, lambda path: (DOCS / path).is_file())


def test_links_of_readmes_lead_somewhere():
    files = [ROOT / 'README.md', *(ROOT / 'kernels_pallas').rglob('README.md')]
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    pages |= {f'docs/{name}': text for name, text in PAGES.items()}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        assert not broken(name, pages[name], pages, lambda path: (ROOT / path).exists()), name


def test_every_option_is_in_the_reference_and_can_be_linked_to():
    assert {key for key, _ in leaves()} <= anchors(GENERATED['reference/options.md'])


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def test_commands_are_found_in_scripts():
    """The parser of this file, on everything that a page may use."""
    script = "A=1 timeout --signal=INT 9 mixcon x \\\n  --y=1 2>/dev/null || echo $? # no\ncat <<'E'\nmixcon no\nE\n"
    script += "until make z; do\nB=$(mixcon w | sed -n '1p')\necho 'a\nmixcon no' >f\ndone\n"
    found = [['mixcon', 'x', '--y=1'], ['echo', '$?'], ['cat'], ['make', 'z'], ['mixcon', 'w'], ['sed', '-n', '1p']]
    assert list(commands(script)) == [*found, ['echo', 'a\nmixcon no'], ['done']]


@pytest.mark.parametrize('name', SCRIPTED)
def test_commands_parse(name, tmp_path):
    """Arguments, options of the configuration, experiment files and targets exist, on the page or in the repository."""
    todo = list(steps(name))
    for step in todo:
        if step.path.endswith('.py'):
            path = tmp_path / step.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.shown)
            compile(step.shown, step.path, 'exec')
    extended = any(step.path.startswith('mixcon_jax/') for step in todo)  # then options and patterns may be new
    scripts = {(step.where, text) for step in todo if not step.path for text in (step.shown, step.text)}
    for where, script in sorted(scripts):
        for command in commands(script):
            try:
                check(command, tmp_path, extended)
            except (Exception, SystemExit) as error:
                pytest.fail(f'{where}: {shlex.join(command)}: {error}')


def check(command: list[str], written: Path, extended: bool) -> None:
    """Fails when a command of ours cannot be what was meant.

    Args:
      command: its words.
      written: folder with the files that the page has its reader write.
      extended: whether it also has its reader extend the package, and with it what a configuration may say.
    """
    program, arguments, parser = command[0].removeprefix('.venv/bin/'), command[1:], build_parser()
    if program == 'make':
        targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert {word for word in arguments if '=' not in word} <= set(targets), 'no such target'
        return
    if program == 'python' and arguments[:1] == ['-m'] and arguments[1].startswith('launch.'):
        module = importlib.util.find_spec(arguments[1])
        name = f'{module.name}.sweep' if module.submodule_search_locations else module.name
        parser, arguments = importlib.import_module(name).build_parser(), arguments[2:]
    elif program != 'mixcon':
        return
    with contextlib.redirect_stderr(sys.stdout):  # argparse says there what is wrong
        if program == 'python' and not parser.prog.endswith('.sweep'):  # several processes of a command of mixcon
            asked, arguments = member.command_of(arguments, parser.prog)
            parser, arguments = build_parser(), [asked, *parser.parse_known_args(arguments)[1]]
        known, rest = parser.parse_known_args(arguments)
    config = getattr(known, 'config', None)
    overrides = parse_overrides(rest, shlex.join(command), takes=getattr(known, 'takes_overrides', True))
    if config is None:
        configs.mesh_of(overrides)
    else:
        folder = written if (written / config.split(':')[0]).exists() else ROOT
        if extended:
            configs.load(str(folder / config))
        else:
            configs.validate(configs.load(str(folder / config), overrides))


# ---------------------------------------------------------------------------------------------------------------------
# As printed
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='session')
def home(tmp_path_factory) -> Path:
    """A home for all pages, so that they prepare the standard library's text once."""
    return tmp_path_factory.mktemp('home')


@pytest.mark.slow
@pytest.mark.parametrize('name', RUN)
def test_page_runs_as_printed(name, tmp_path, home):
    clone = tmp_path / 'mixcon'
    # Further down there is mixcon_jax/runs, in whose absence that of the installed package would be imported.
    top, below = shutil.ignore_patterns(*NOT_COPIED, '__pycache__'), shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT, clone, ignore=lambda path, names: (top if path == str(ROOT) else below)(path, names))
    flags = [flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag]
    environment = os.environ | {
        'HOME': str(home),
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'PYTHONPATH': str(clone),
        'XLA_FLAGS': ' '.join(flags),
        # Most of a short run is importing: keep the compiled modules even where the environment says not to.
        'PYTHONDONTWRITEBYTECODE': '',
        'PYTHONPYCACHEPREFIX': str(ROOT / '.cache' / 'pycache'),
    }
    for step in steps(name):
        if step.path:
            (clone / step.path).parent.mkdir(parents=True, exist_ok=True)
            (clone / step.path).write_text(step.text)
        elif not step.skipped:
            result = subprocess.run(
                ['bash', '-euo', 'pipefail', '-c', step.text],
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=1800,
                check=False,
            )
            print(f'{step.where}: exit code {result.returncode}\n{step.text}\n{result.stdout}\n{result.stderr}')
            assert result.returncode == 0, f'{step.where}: {step.text}\n{result.stderr[-2000:]}'


@pytest.mark.parametrize('name', ['reliability.md', 'testing.md'])
def test_every_test_that_a_table_of_tests_names_exists(name):
    tests = '\n'.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    named = set(re.findall(r'`(test_\w+)`', PAGES[name]))
    assert len(named) > 40
    assert not {name for name in named if f'def {name}(' not in tests}


def test_every_kind_of_fault_has_tests_and_every_door_has_kinds():
    section = PAGES['testing.md'].split('## Doors and kinds')[1].split('\n## ')[0]
    named = set(re.findall(r'\*\*(\w+)\*\*', section))
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in section.splitlines() if line[:1] == '|']
    kinds, doors, tests = zip(*rows[2:], strict=True)
    assert set(doors) == named
    assert kinds[0] and all('`test_' in each for each in tests)
    assert len(set(filter(None, kinds))) == len(list(filter(None, kinds))) > 12


# ---------------------------------------------------------------------------------------------------------------------
# The map of the house
# ---------------------------------------------------------------------------------------------------------------------
NOT_NAMES = re.compile(r'make \w+|\w+\(\)')  # what else the map has in backticks: targets, functions


def mapped() -> dict[str, list[str]]:
    """What README's map names in each folder that has a line, in backticks as everything that it names."""
    text = (ROOT / 'README.md').read_text().split('## The map of the house')[1].split('\n\n')[1]
    found: dict[str, list[str]] = {}
    parents: dict[int, str] = {}  # by the indentation of what lies in them
    for item in re.split(r'\n(?= *- )', text.strip('\n')):
        depth = item.index('-')
        folder, names = parents.get(depth, ''), re.findall(r'`([^`]+)`', item)
        if head := re.match(r' *- `(\w+)/`', item):
            folder = parents[depth + 2] = f'{folder}/{head[1]}'.lstrip('/')
            names = names[1:]
        assert folder, f'README.md: {item!r} is of no folder'
        found.setdefault(folder, []).extend(name for name in names if not NOT_NAMES.fullmatch(name))
    return found


def missing(named: dict[str, list[str]]) -> set[str]:
    """What the map does not name: modules of a folder that has a line, and folders that have none and are not named."""
    wrong = set()
    for top in ('launch', 'mixcon_jax', 'kernels_pallas'):
        for path in sorted((ROOT / top).rglob('*.py')):
            name, folder = path.stem, path.parent.relative_to(ROOT)
            while folder.as_posix() not in named:
                name, folder = f'{folder.name}/', folder.parent
            if not name.startswith('__') and name not in named[folder.as_posix()]:
                wrong.add(f'{folder}/{name}')
    return wrong


def unreal(named: dict[str, list[str]]) -> set[str]:
    """What the map names and is not there: a folder by a slash at the end, a file by its ending, else a module."""
    wrong = set()
    for folder, names in named.items():
        for name in names:
            path = ROOT / folder / (name if name.endswith(('/', '.py')) else f'{name}.py')
            if not (path.is_dir() if name.endswith('/') else path.is_file()):
                wrong.add(f'{folder}/{name}')
    return wrong


def test_the_map_in_the_readme_names_every_module_and_nothing_else():
    """Of a kernel or a layer its folder, below which each has files of its own."""
    named = mapped()
    assert sum(map(len, named.values())) > 100
    assert not missing(named), 'README.md says nothing of them'
    assert not unreal(named), 'README.md names what is not there'
    assert all(len(names) == len(set(names)) for names in named.values()), 'README.md names one twice'


def test_a_word_that_is_no_name_stands_for_no_module():
    """Prose is no name, nor is a name of another folder."""
    named = mapped()
    assert 'startup' in named['mixcon_jax'] and 'loop' not in named['mixcon_jax']
    named['mixcon_jax'].remove('trees')
    named['mixcon_jax/data'].append('trees')
    named['mixcon_jax/models'].remove('mixers/')
    named['kernels_pallas'].append('flash/')
    assert missing(named) == {'mixcon_jax/models/mixers/', 'mixcon_jax/trees'}
    assert unreal(named) == {'mixcon_jax/data/trees', 'kernels_pallas/flash/'}
