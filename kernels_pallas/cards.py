"""Verification cards: what GPUs have shown of a kernel, and whether that covers the sources that run.

A kernel's cards lie beside its sources, in `<kernel>/verified.json`, one for each variant and GPU. They are written by
`python -m tests.gpu.accept`. What `python -m kernels_pallas.verify` finds on the user's own GPU goes into a folder of
local cards and counts the same. A card covers a kernel while the hash of its sources stands: a line changed in any file
that the kernel is built from makes the card stale. Comments, the text of docstrings and layout are not in the hash.
Of a kernel that is a library's, the sources are those of the adapter, and the library's version is a line of them.
Variants whose names begin with WORD are built from `WORD_mosaic_gpu.py`, where there is one, and from no other's files.
"""

import ast
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import tempfile
import tokenize
from collections.abc import Iterable, Sequence

import jax

PACKAGE = pathlib.Path(__file__).parent
FILE, SUFFIX = 'verified.json', '_mosaic_gpu.py'
ADAPTERS, NAMESAKES = ('tokamax.py',), ('cudnn.py',)  # to a library; the variants of the second bear its name
VERIFIED = 'verified'
COMMAND = 'python -m kernels_pallas.verify'
TRUST, FOLDER = 'MIXCON_TRUST_UNVERIFIED', 'MIXCON_CARDS'  # environment variables


@dataclasses.dataclass(frozen=True)
class Card:
    """What one GPU has shown of one variant of a kernel.

    Attributes:
      kernel: name of its folder.
      variant: which of the kernel's programs, such as 'readout'.
      outcome: 'verified', or in a few words why it does not count.
      device: what JAX calls the GPU.
      compute_capability: such as '9.0'.
      driver: version of NVIDIA's driver, or ''.
      jax, jaxlib: versions.
      date: ISO date.
      sources: `source_hash` of the variant that ran, or of sources that are compiled to the same programs.
      command: what wrote this.
      cases: largest relative error, in the 2-norm, of any output or gradient, by case.
      times: milliseconds and floors, by shape.
      ran: `source_hash` of the variant that ran, where `sources` is another's (`tests.gpu.programs`); else ''.
    """

    kernel: str
    variant: str
    outcome: str
    device: str
    compute_capability: str
    driver: str
    jax: str
    jaxlib: str
    date: str
    sources: str
    command: str
    cases: dict[str, float] = dataclasses.field(default_factory=dict)
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    ran: str = ''

    @property
    def major(self) -> int:
        """The major compute capability; 0 where the card has none."""
        number = self.compute_capability.partition('.')[0]
        return int(number) if number.isdecimal() else 0

    @property
    def current(self) -> bool:
        """Whether it is of the sources that are here."""
        return self.sources == source_hash(self.kernel, self.variant)

    @property
    def counts(self) -> bool:
        """Whether a kernel may run by it."""
        return self.outcome == VERIFIED and self.current

    @property
    def state(self) -> str:
        """The outcome, and whether the sources have changed since."""
        return self.outcome if self.current else f'stale ({self.outcome})'


# -------------------------------------------------------------------------------------------------------- sources
def kernels() -> list[str]:
    """The kernels that have GPU sources, our own or an adapter to a library's, by name."""
    patterns = ('*/mosaic_gpu*', *(f'*/{adapter}' for adapter in (*ADAPTERS, *NAMESAKES)))
    found = (path for pattern in patterns for path in PACKAGE.glob(pattern))
    return sorted({path.relative_to(PACKAGE).parts[0] for path in found})


@functools.cache
def sources(kernel: str, variant: str = '') -> tuple[pathlib.Path, ...]:
    """The files that a variant is built from: its `mosaic_gpu` or adapter, and what those import of this package."""
    patterns = 'mosaic_gpu.py', 'mosaic_gpu/*.py', *ADAPTERS
    named = {path: path.name.removesuffix(SUFFIX) for path in PACKAGE.glob(f'{kernel}/*{SUFFIX}')}
    named |= {path: path.stem for name in NAMESAKES for path in PACKAGE.glob(f'{kernel}/{name}')}
    own = [path for path, name in named.items() if variant.startswith(name)]
    own = own or [path for pattern in patterns for path in PACKAGE.glob(f'{kernel}/{pattern}')]
    found: dict[pathlib.Path, None] = {}
    waiting = sorted(own)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = None
            waiting += _imported(path)
    return tuple(sorted(found))


@functools.cache
def source_hash(kernel: str, variant: str = '') -> str:
    """Sixteen hexadecimal digits that change when a line of code in `sources(kernel, variant)` does."""
    digest = hashlib.sha256()
    for path in sources(kernel, variant):
        digest.update(f'{path.relative_to(PACKAGE).as_posix()}\n'.encode())
        digest.update('\n'.join(code(path.read_text(encoding='utf-8'))).encode())
    return digest.hexdigest()[:16]


def code(text: str) -> list[str]:
    """The tokens of a module, without comments, the text of docstrings, and layout."""
    found: list[str] = []
    start = True  # of a statement
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL)
    ]
    for token, following in zip(tokens, [*tokens[1:], None]):
        lone = following is not None and following.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        if start and token.type == tokenize.STRING and lone:
            continue
        layout = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        start = layout
        found.append(tokenize.tok_name[token.type] if layout else token.string)
    return found


def _imported(path: pathlib.Path) -> list[pathlib.Path]:
    """Modules of this package that a file imports, by `from kernels_pallas… import …`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == PACKAGE.name:
            names += [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split('.')[0] == PACKAGE.name]
    files = (PACKAGE.joinpath(*name.split('.')[1:]).with_suffix('.py') for name in names if '.' in name)
    return [file for file in files if file.exists()]


# ---------------------------------------------------------------------------------------------------------- cards
def shipped(kernel: str) -> list[Card]:
    """The cards that lie beside a kernel's sources."""
    return read(PACKAGE / kernel / FILE)


def local(kernel: str) -> list[Card]:
    """The cards that this machine has made for itself; none for several processes, which must all decide alike."""
    folder = None if jax.process_count() > 1 else local_folder()
    return [] if folder is None else read(folder / f'{kernel}.json')


def local_folder() -> pathlib.Path | None:
    """Where this machine's own cards lie: `$MIXCON_CARDS`, else beside JAX's compilation cache.

    That is `$JAX_COMPILATION_CACHE_DIR`, if it is a folder, or the folder where runs keep theirs unless told otherwise.
    """
    if named := os.environ.get(FOLDER):
        return pathlib.Path(named)
    cache = os.environ.get('JAX_COMPILATION_CACHE_DIR', '')
    if cache and '://' not in cache:
        return pathlib.Path(cache).parent / 'mixcon_kernels'
    try:
        caches = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    except RuntimeError:  # no HOME and no entry in passwd
        return None
    return caches / 'mixcon' / 'kernels'


def read(path: pathlib.Path) -> list[Card]:
    """The cards in a file; none where there is no file, and none from a file that is not one of cards."""
    names = [field.name for field in dataclasses.fields(Card)]  # a later version may write more of them
    try:
        entries = json.loads(path.read_text(encoding='utf-8'))['cards']
        return [Card(**{name: entry[name] for name in names if name in entry}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write(path: pathlib.Path, cards: Iterable[Card]) -> None:
    """Puts cards into a file in place of older ones of the same variant and GPU; a reader sees the old or the new.

    A card without times keeps those that an older one has of the same sources.
    """
    merged = {(card.variant, card.device): card for card in read(path)}
    for card in cards:
        old = merged.get((card.variant, card.device))
        keeps = old is not None and not card.times and old.sources == card.sources
        merged[card.variant, card.device] = dataclasses.replace(card, times=old.times) if old and keeps else card
    entries = [dataclasses.asdict(merged[name]) for name in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            json.dump({'cards': entries}, file, indent=1)
            file.write('\n')
        os.chmod(name, 0o644)  # a temporary file is its owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# --------------------------------------------------------------------------------------------------------- answers
def trusted() -> bool:
    """Whether the user runs kernels that no GPU has shown: `MIXCON_TRUST_UNVERIFIED=1`."""
    return os.environ.get(TRUST, '').lower() not in ('', '0', 'false', 'no')


def uncovered(kernel: str, variants: Sequence[str], major: int, device: str = '') -> str | None:
    """Why a kernel may not run by its cards, or None if it may.

    What this machine has found decides; else what this GPU model has shown, else its like.

    Args:
      kernel: name of its folder.
      variants: which of its programs.
      major: compute capability of the GPU that it is to run on.
      device: that GPU's name.
    """
    return next(filter(None, (_uncovered(kernel, variant, major, device) for variant in variants)), None)


def _uncovered(kernel: str, variant: str, major: int, device: str) -> str | None:
    theirs, ours = (
        [card for card in found if card.variant == variant and card.major == major] for found in _both(kernel)
    )
    name = f'{kernel} ({variant})'
    current = [card for card in theirs if card.current]
    alike = [card for card in ours if card.current] or [card for card in current if card.device == device]
    wrong = [card for card in alike or current if card.outcome != VERIFIED]
    if wrong and (alike or len(wrong) == len(current)):
        return f'{name}: {wrong[-1].outcome}, on {wrong[-1].device}'
    if alike or current:
        return None
    if any(card.outcome == VERIFIED for card in (*theirs, *ours)):
        return f'{name} has changed since a GPU verified it'
    return f'no GPU of compute capability {major}.x has verified {name}'


def other_jax(kernel: str, variants: Sequence[str], major: int) -> str | None:
    """The versions of JAX that verified one of these variants, where the one that is here is not among them."""
    cards = [card for found in _both(kernel) for card in found if card.major == major and card.counts]
    for variant in variants:
        versions = {card.jax for card in cards if card.variant == variant}
        if versions and jax.__version__ not in versions:
            return ', '.join(sorted(versions))
    return None


def _both(kernel: str) -> tuple[list[Card], list[Card]]:
    """The shipped cards and the local ones, read once a process and folder."""
    return _read_both(kernel, str(local_folder()))


@functools.lru_cache(maxsize=64)
def _read_both(kernel: str, folder: str) -> tuple[list[Card], list[Card]]:
    del folder  # another one has other cards
    return shipped(kernel), local(kernel)


def forget() -> None:
    """Cards and hashes are read once a process; after this, anew."""
    for function in (sources, source_hash, _read_both):
        function.cache_clear()
