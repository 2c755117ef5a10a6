"""Output never ends what is at work: closed, full, gone, or of another encoding than UTF-8."""

import ast
import errno
import io
import os
import re
import subprocess
import sys

import pytest

from mixcon_jax.host.output import LiveLine, Output, OutputLost, go_on, guarded
from mixcon_jax.runs.records import last, read
from tests.launch.launching import small_config
from tests.tiny import ROOT, write_experiment


class Broken(io.StringIO):
    """Takes some text, then none."""

    def __init__(self, room: int, number: int = errno.EPIPE) -> None:
        super().__init__()
        self.room, self.number = room, number

    def write(self, text: str) -> int:
        if len(self.getvalue()) + len(text) > self.room:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize('number', [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_what_cannot_be_written_is_lost_and_said_once(number, monkeypatch):
    out, errors = Broken(4, number), io.StringIO()
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', errors)
    with guarded():
        go_on()
        for _ in range(3):
            print('abc', flush=True)
    assert sys.stdout is out and out.getvalue() == 'abc\n'
    assert errors.getvalue() == f'note: the output is lost ({os.strerror(number)}); the command goes on\n'


def test_a_command_that_only_shows_something_ends_with_its_reader(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', Broken(4))
    with guarded():
        print('abc')
        with pytest.raises(OutputLost, match='Broken pipe'):
            print('abc')


def test_errors_that_cannot_be_shown_are_lost(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Broken(0))
    with guarded():
        print('error: x', file=sys.stderr, flush=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_makes_way_for_lines():
    """What a terminal shows, for which a carriage return goes back to the beginning of the line."""
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        line = LiveLine(stream)
        line.live('a 10/100 · b 3/100')
        line.live('a 11/100')
        line.say('b done')
    *_, shown = terminal.getvalue().split('\r')
    assert shown == 'b done\n'
    assert 'a 11/100'.ljust(len('a 10/100 · b 3/100')) in terminal.getvalue()
    assert pipe.getvalue() == 'b done\n'


def test_a_reader_that_goes_away_ends_nothing():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    line = LiveLine(Gone())
    line.say('one')
    line.live('two')
    line.say('three')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_every_letter_takes_one_place_in_every_encoding(encoding):
    """Half of a pair of surrogates stands for a byte of a name that is not UTF-8."""
    written = io.BytesIO()
    stream = Output(io.TextIOWrapper(written, encoding=encoding), goes_on=False)
    print('a·⣀\udce9', file=stream, end='', flush=True)
    expected = 'a·⣀\udce9'.encode(encoding, 'replace')
    assert written.getvalue() == expected and len(expected.decode(encoding)) == 4


# ---------------------------------------------------------------------------------------------------------------------
# As a process
# ---------------------------------------------------------------------------------------------------------------------
def shell(line: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a line in which ``$MIXCON`` is the command."""
    command = f'{sys.executable} -m mixcon_jax.cli'
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'MIXCON': command, 'COLUMNS': '300'} | settings
    return subprocess.run(['bash', '-c', line], env=environment, capture_output=True, text=True)


@pytest.fixture
def shown(tmp_path):
    """A folder with what `mixcon watch`, the quickest command to start, takes for a run."""
    run = tmp_path / 'é'
    run.mkdir()
    (run / 'config.json').write_text('{}')
    (run / 'metrics.jsonl').write_text('{"kind": "train", "step": 1, "loss": 2.5, "time": 1}\n')
    return run


def test_streams_that_are_closed_or_full(shown):
    watch = f'$MIXCON watch {shown}'
    done = shell(f'{watch} <&- >&- 2>&-; echo $?; {watch} >/dev/full; echo $?')
    assert done.stdout.split() == ['0', '1']
    assert done.stderr == 'error: the output cannot be written (No space left on device)\n'


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    program = f"""
import os
os.close(1)
from mixcon_jax.host.output import guarded
with guarded():
    with open({str(tmp_path / 'file')!r}, 'w') as file:
        file.write('ours'); file.flush()
        os.write(1, b'output of a library')
"""
    subprocess.run([sys.executable, '-c', program], env=os.environ | {'PYTHONPATH': str(ROOT)}, check=True)
    assert (tmp_path / 'file').read_text() == 'ours'


def test_names_are_utf8_whatever_the_locale(shown):
    """Where Python would read arguments as ASCII, and write a name in other bytes than the libraries do."""
    plain = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = shell(f'$MIXCON watch {shown}', **plain)
    assert done.returncode == 0 and f'{shown} · seed ?' in done.stdout, done.stderr
    done = shell(f'$MIXCON watch {shown}', **plain, PYTHONIOENCODING='ascii')
    assert done.returncode == 0 and f'{shown} · seed ?'.replace('é', '?').replace('·', '?') in done.stdout


def test_bytes_that_are_no_text_are_refused_in_one_line(tmp_path):
    """As an option and as the name of a run's folder; tests/test_cli.py has a prompt."""
    train = f'$MIXCON train --config {ROOT}/experiments/quickstart.py --workdir'
    done = shell(rf"{train} $'{tmp_path}/caf\xe9'; {train} {tmp_path}/run $'--config.name=caf\xe9'")
    first, second = done.stderr.splitlines()
    for line in (first, second):
        assert line.startswith('error: ') and r'caf\xe9' in line and 'is not UTF-8' in line
    assert not list(tmp_path.iterdir())


def test_a_run_ends_well_though_nobody_can_read_what_it_says(tmp_path):
    """Its output full and ASCII, its errors closed, its folder named in UTF-8, the locale another."""
    workdir = tmp_path / 'läuft'
    experiment = write_experiment(tmp_path / 'experiment.py', small_config(tmp_path, train__steps=2))
    flags = ' '.join(flag for flag in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in flag)
    plain = {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}
    line = f'$MIXCON train --config {experiment} --workdir {workdir} >/dev/full 2>&-'
    done = shell(line, XLA_FLAGS=flags, **plain)
    assert done.returncode == 0
    assert last(read(workdir / 'metrics.jsonl'), kind='run')['event'] == 'done'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['cache', 'corpus', 'experiment.py', 'läuft']
    assert (workdir / 'checkpoints' / '2').is_dir()


TEXT_MODE = re.compile('[rwax][+t]*')
ALWAYS_TEXT = ('read_text', 'write_text', 'TextIOWrapper')
OPENERS = ('open', 'fdopen', 'NamedTemporaryFile', 'TemporaryFile')
BINARY = ('gzip', 'bz2', 'lzma', 'zstandard', 'tempfile', 'os')  # modules whose openers take bytes unless told


def opens_text(call: ast.Call) -> bool:
    """Whether the call opens, reads or writes a file as text in the locale's encoding."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')
    module = getattr(function.value, 'id', '') if isinstance(function, ast.Attribute) else ''
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == 'mode')]
    constants = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    if any(keyword.arg == 'encoding' for keyword in call.keywords) or 'utf-8' in constants:
        return False
    if name in ALWAYS_TEXT:
        return True
    if name not in OPENERS:
        return False
    modes = [constant for constant in constants if TEXT_MODE.fullmatch(constant)]
    if module in BINARY and name != 'fdopen':
        return any(module == 'tempfile' or 't' in mode for mode in modes)
    if modes or any(keyword.arg == 'mode' for keyword in call.keywords):
        return bool(modes)
    # Without a mode. A path's method takes nothing then; what else has that name takes something.
    method = isinstance(function, ast.Attribute) and module != 'os'
    return len(call.args) == (0 if method else 1)


@pytest.mark.parametrize('source, text', [
    ("open(path)", True), ("open(path, 'w')", True), ("open(path, mode='a+')", True), ("open(path, 'rb')", False),
    ("open(path, mode='wb')", False), ("open(path, encoding='utf-8')", False), ("path.open()", True),
    ("path.open('w')", True), ("path.open(mode='w')", True), ("path.open('rb')", False), ("path.read_text()", True),
    ("path.read_text('utf-8')", False), ("gzip.open(path, 'rt')", True), ("gzip.open(path, mode='wt')", True),
    ("gzip.open(path, 'w')", False), ("gzip.open(path)", False), ("os.fdopen(file)", True), ("os.fdopen(3, 'w')", True),
    ("os.open(path, flags)", False), ("store.open('train')", False), ("TokenStore.open(path, split)", False),
    ("tempfile.NamedTemporaryFile('w')", True), ("tempfile.NamedTemporaryFile()", False),
    ("io.TextIOWrapper(raw)", True),
])  # fmt: skip
def test_what_opens_text_is_recognised(source, text):
    assert opens_text(ast.parse(source, mode='eval').body) == text


def test_every_file_that_the_program_opens_as_text_is_utf8():
    for package in ('mixcon_jax', 'launch', 'kernels_pallas', 'experiments'):
        for path in sorted((ROOT / package).rglob('*.py')):
            tree = ast.parse(path.read_text(encoding='utf-8'))
            lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and opens_text(node)]
            assert not lines, f'{path}, lines {lines}: encoding="utf-8" is missing'
