"""What an option is, and the table of all that are not of a layer: default, meaning and the values it may take.

A layer declares its own options in its file; ``mixcon_jax.config.table()`` has all of them together.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

INT32, UINT32 = 2**31 - 1, 2**32 - 1  # the largest integers that 32 bits hold
SMALLEST = 2.0**-126  # what is closer to 0 becomes 0 where float32 is computed

# What acts through the tokens alone that are prepared with it. A checkpoint knows those by their hash, so a run goes on
# with other values that give the same tokens, such as the new place of text that has been moved.
THROUGH_TOKENS = ('data.sources', 'data.bad_records', 'data.text_field', 'data.tokenizer')


@dataclass(frozen=True)
class Check:
    """What an option's value must satisfy, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


@dataclass(frozen=True)
class Option:
    """One leaf of the configuration."""

    default: Any
    meaning: str
    check: Check | None = None
    element: type | None = None  # the type of a tuple's elements
    most: int = INT32  # of an integer
    between: str = ','  # a pattern of what lies between elements that the command line gives as one
    path: str = ''  # of an option that holds a path: what to name there; it may be empty only where that is the default
    derive: Callable[[Any], Any] | None = (
        None  # of a layer's option: what its default, 0 or (), stands for, from ``config.model``
    )
    # Whether it may change between one start of a run and the next: what does not enter the sequence of updates. On
    # another mesh, in other tiles or chunks, or with parts computed again, sums are taken in another order, and so they
    # are over devices once a step: the run goes on, but not bit for bit.
    free: bool = False
    # Whether it is of learning alone: what a model of given weights and buffers computes does not depend on it.
    learning: bool = False
    needs: str = ''  # the option of its group without which it is not read


@dataclass(frozen=True)
class Statistic:
    """What a layer reports of itself at every step, as ``mixcon watch`` shows it.

    Attributes:
      meaning: in words.
      title: of the table it stands in; statistics of one title stand together, in the order of their declaration.
      form: ``number``, a column; ``shares`` that add up to 1, a bar each; and beside a title's bars ``aside``, a number,
        or ``exception``, a share that is told where it is not 0.
      label: its name there; that in the metrics, if left out.
    """

    meaning: str
    title: str = 'statistics'
    form: str = 'number'
    label: str = ''


def float32(value: float) -> float:
    """The float32 that comes nearest, infinity and 0 included."""
    if not math.isfinite(value):
        return value
    try:
        rounded = struct.unpack('f', struct.pack('f', value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= SMALLEST else math.copysign(0.0, value)


def beyond(value: float, most: int = INT32) -> str:
    """What is wrong with a number that 32 bits cannot hold, in words; empty for any other."""
    if isinstance(value, int):
        return '' if -INT32 - 1 <= value <= most else f'is more than 32 bits hold; it must be at most {most}'
    rounded = float32(value)
    if not math.isfinite(rounded):
        return 'must be finite' if not math.isfinite(value) else 'is infinite in float32; the largest is 3.4e38'
    return 'is 0 in float32; the smallest is 1.2e-38' if rounded == 0 != value else ''


def at_least(low: float) -> Check:
    return Check(lambda value: value >= low, f'at least {low}')


def above(low: float) -> Check:
    return Check(lambda value: value > low, f'greater than {low}')


def between(low: float, high: float) -> Check:
    return Check(lambda value: low <= value <= high, f'between {low} and {high}')


def decaying_steps(fraction: float, steps: int) -> float:
    """How many of a run's steps decay, by their share: a whole one at least, if any, so that the last has its value."""
    return max(fraction * steps, 1.0) if fraction else 0.0


def swiglu_width(dim: int) -> int:
    """The width of a SwiGLU that nobody chose: 8/3 dim, rounded up to a multiple of 16."""
    return -(-8 * dim // 48) * 16


def multiple_of(factor: int) -> Check:
    return Check(lambda value: value >= 0 and value % factor == 0, f'a multiple of {factor}')


def one_of(*choices: str) -> Check:
    return Check(lambda value: value in choices, 'one of ' + ', '.join(choices))


def free(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same group of options, all of which may change between one start of a run and the next."""
    return {
        name: replace(node, free=True) if isinstance(node, Option) else free(node) for name, node in options.items()
    }


POSITIVE, COUNT, FRACTION = at_least(1), at_least(0), between(0.0, 1.0)
BELOW_ONE = Check(lambda value: 0 <= value < 1, 'at least 0 and less than 1')
PAIR = Check(lambda value: len(value) == 2 and all(0 <= v < 1 for v in value), 'two numbers in [0, 1)')
# A comma ends a source where the next one of a known kind begins; other commas are of a path.
SOURCES = r',\s*(?=(?:files|huggingface|store|synthetic):|stdlib\s*(?:,|$))'
DTYPE = one_of('float32', 'bfloat16')
SIZE = Check(lambda value: value == -1 or value >= 1, '-1 or at least 1')  # of a mesh axis

OPTIONS: dict[str, Any] = {
    'name': Option('', 'Name of the run, shown in its logs.', free=True),
    'seed': Option(0, 'Seed of initial values, data order and noise.', COUNT, most=UINT32),
    'model': {
        'vocab_size': Option(2048, 'Rows of the embedding; at least the tokenizer\'s vocabulary.', POSITIVE),
        'dim': Option(128, 'Width D of the residual stream.', POSITIVE),
        'num_blocks': Option(1, 'How often the pattern repeats.', POSITIVE),
        'pattern': Option(
            ('conba+mlp', 'conba+moe', 'attention+mlp', 'conba+moe'),
            'Layers of one block: "mixer", "mixer+ffn" (two residual steps) or "mixer|ffn" (parallel).',
            Check(lambda value: len(value) > 0, 'at least one layer'),
            element=str,
        ),
        'shortcut': {
            'reduction': Option(
                0, 'A narrow shortcut around every mixer, of width dim / reduction; 0 has none, PanGu-pi has 32.', COUNT
            ),
        },
        'norm': Option('rms', 'Norms before mixers and FFNs and before the head: "rms", or "layer", which takes off the mean and adds a bias.', one_of('rms', 'layer')),
        'norm_eps': Option(1e-6, 'Epsilon of every norm.', above(0.0)),
        'embedding_norm': Option(False, 'A norm of the same kind between embedding and first block.'),
        'tie_embeddings': Option(False, 'Use the embedding as the output head.'),
        'init_std': Option(0.02, 'Standard deviation of initial weights; output projections divide it by sqrt(2 layers).', above(0.0), learning=True),
        'dtype': Option('float32', 'Compute type; parameters and recurrent states stay float32.', DTYPE),
        'remat': Option(
            'none', 'What the backward pass computes again: nothing; a layer\'s elementwise parts, "selective", but no product and no GPU kernel;'
            ' all but the products with weights, "dots"; or everything in a block.',
            one_of('none', 'selective', 'dots', 'block'), free=True,
        ),
        'unroll': Option(
            0, 'Blocks that one round of the loop over blocks holds: more take less memory beside what is kept, and longer to compile;'
            ' 0 picks: on GPUs all where the model has up to 32 layers, else one.',
            COUNT, free=True,
        ),
        'embedding_gradient': Option(
            'auto', 'How the gradient of the embedding adds up its tokens: by XLA\'s "scatter"; "sorted", in one order on every device; "auto"'
            ' is sorted on GPUs, where a scatter in one order takes longer, and scatter elsewhere.',
            one_of('auto', 'scatter', 'sorted'), learning=True,
        ),
        'layers': {},  # groups of options by the name that a pattern calls them: models/pattern.py
        # Here follow the groups of the layers, each in its layer's file: models/kinds.py.
    },
    'data': {
        'sources': Option(
            ('stdlib',),
            'Text: "stdlib", "files:GLOB" (.txt .jsonl .parquet, also .gz .zst), "huggingface:NAME[/SUBSET]" or "store:PATH";'
            ' or a task: "synthetic:selective_copying", "synthetic:induction" or "synthetic:mqar".',
            Check(lambda value: len(value) > 0, 'at least one source'), element=str, between=SOURCES,
        ),
        'weights': Option((), 'Sampling weight of each source; empty means by size.', element=float),
        'bad_records': Option(
            'refuse', 'Records that cannot be used: "refuse" them, or "skip" and count them.', one_of('refuse', 'skip'),
        ),
        'text_field': Option('text', 'Field that holds the text in JSONL, Parquet and Hugging Face records.'),
        'cache_dir': Option('~/.cache/mixcon', 'Folder of prepared token stores and tokenizers.', path='a folder', free=True),
        'tokenizer': Option('bpe', '"bpe" trains one on the sources; otherwise the path of a tokenizer.json.', path='a tokenizer.json, or "bpe"'),
        'tokenizer_vocab_size': Option(2048, 'Vocabulary of a trained tokenizer.', between(257, 10**6)),
        'heldout_fraction': Option(0.05, 'Share of documents that is held out.', Check(lambda v: 0 < v < 1, 'between 0 and 1, exclusive')),
        'seq_len': Option(256, 'Tokens T a row.', at_least(2)),
        'packing': Option(True, 'Pack several documents into a row; off gives each row one document.'),
        'prefetch': Option(8, 'Batches prepared ahead.', COUNT, free=True),
        'num_threads': Option(2, 'Threads that read rows.', POSITIVE, free=True),
        'synthetic': {
            'symbols': Option(16, 'Symbols that a synthetic task uses.', at_least(2)),
            'num_items': Option(8, 'What there is to remember: symbols to copy, or pairs; induction has always one.', POSITIVE),
            'min_items': Option(0, 'Items at the beginning of the curriculum; 0 means num_items.', COUNT),
            'min_length': Option(0, 'Tokens of a sequence at the beginning of the curriculum; 0 means data.seq_len.', COUNT),
            'curriculum_steps': Option(0, 'Steps until the curriculum reaches data.seq_len and num_items; 0 is none.', COUNT),
            'eval_lengths': Option(
                (), 'Tokens of the sequences that are scored; empty means data.seq_len.',
                Check(lambda value: all(v >= 2 for v in value), 'lengths of at least 2'), element=int, free=True,
            ),
            'eval_rows': Option(256, 'Sequences that are scored at each length.', POSITIVE, free=True),
        },
    },
    'optim': {
        'name': Option('adamw', 'Optimizer.', one_of('adamw', 'muon', 'lion', 'adafactor')),
        'learning_rate': Option(4e-3, 'Peak learning rate.', above(0.0)),
        'schedule': Option('cosine', 'Shape after warm-up: cosine, warm-up-stable-decay, linear to the end, or constant.', one_of('cosine', 'wsd', 'linear', 'constant')),
        'warmup_steps': Option(30, 'Steps of linear warm-up.', COUNT),
        'decay_fraction': Option(0.2, 'Share of the steps that decay, with schedule="wsd".', FRACTION),
        'final_fraction': Option(0.1, 'Last learning rate as a share of the peak.', FRACTION),
        'betas': Option((0.9, 0.95), 'Decay rates of the moments.', PAIR, element=float),
        'eps': Option(1e-8, 'Epsilon of Adam.', above(0.0)),
        'momentum': Option(0.95, 'Momentum of Muon.', BELOW_ONE),
        'weight_decay': Option(0.1, 'Decoupled weight decay, on weight matrices only.', at_least(0.0)),
        'clip_norm': Option(1.0, 'Global gradient norm to clip to; 0 is off.', at_least(0.0)),
        'muon_learning_rate': Option(0.02, 'Peak learning rate of the matrices under Muon.', above(0.0)),
    },
    'train': {
        'steps': Option(600, 'Optimizer steps.', POSITIVE),
        'batch_size': Option(4, 'Rows of the global batch.', POSITIVE),
        'accum_steps': Option(1, 'Microbatches a step.', POSITIVE),
        'sum_gradients': Option(
            'microbatch',
            'How often gradients are summed over mesh.data: every microbatch, as XLA does by itself, or once a "step", which'
            ' no GPUs have run yet.',
            one_of('microbatch', 'step'), free=True,
        ),
        'loss_chunk': Option(
            0, 'Tokens a chunk of the cross-entropy, on each device; 0 picks: on GPUs as many as have up to 1 GiB of float32 logits (half as'
            ' much again is their gradient), which costs the fewest passes over the head\'s gradient, elsewhere 1024.',
            COUNT, free=True,
        ),
        'z_loss_coef': Option(0.0, 'Weight of the cross-entropy\'s z-loss.', at_least(0.0)),
        'max_bad_steps': Option(10, 'Consecutive steps with a non-finite loss or gradient that end the run.', POSITIVE, free=True),
        'extend': Option(False, 'Go on with another train.steps though the steps so far followed the schedule of the old one.', free=True),
        'init_from': Option('', 'Workdir whose weights start this run, with new data and schedule.', path='a workdir'),
        'deterministic': Option(True, 'On GPUs, steps that give the same bits every time, which cost 14 to 23 % of the speed where it was measured; CPUs always do.', free=True),
        'xla_flags': Option(
            (), 'Flags of XLA\'s for the train step, "/" between on the command line; the page "Flags of XLA" has those worth a try.',
            Check(lambda value: all(v.startswith('xla_') and '=' in v for v in value), 'NAME=VALUE each, such as xla_gpu_autotune_level=0'),
            element=str, between=r'[,/\s]+(?=xla_)', free=True,
        ),
        'seed_noise': Option(0, 'Added to the seed of Conba\'s noise.', COUNT),
    },
    'eval': free({
        'every': Option(200, 'Steps between held-out evaluations; 0 evaluates at the end only.', COUNT),
        'batch_size': Option(0, 'Rows of an evaluation batch; 0 means those of a microbatch, train.batch_size / train.accum_steps.', COUNT),
        'max_rows': Option(0, 'Held-out rows scored during the run; 0 means all. The end always scores all.', COUNT),
    }),
    'checkpoint': free({
        'every': Option(200, 'Steps between checkpoints; the end always saves.', POSITIVE),
        'keep_last': Option(2, 'Newest checkpoints kept.', POSITIVE),
        'keep_best': Option(1, 'Checkpoints kept by held-out loss.', COUNT),
    }),
    'log': free({
        'every': Option(10, 'Steps between lines of metrics.jsonl.', POSITIVE),
        'tensorboard': Option(True, 'Write TensorBoard events.'),
        'wandb': Option(False, 'Log to Weights & Biases (needs the wandb extra).'),
        'peak_flops': Option(0.0, 'Peak FLOP/s of one device, for MFU; 0 looks it up.', at_least(0.0)),
        'profile_start': Option(0, 'First step of a profiler trace; 0 is off.', COUNT),
        'profile_steps': Option(3, 'Steps a profiler trace covers.', POSITIVE),
    }),
    'mesh': free({
        'data': Option(-1, 'Devices that share out the batch; of one axis -1 takes what the others leave.', SIZE),
        'fsdp': Option(1, 'Devices that share out the batch and the parameters.', SIZE),
        'expert': Option(1, 'Devices that share out the batch and the experts.', SIZE),
        'context': Option(1, 'Devices that share out every sequence.', SIZE),
        'tensor': Option(1, 'Devices that share out heads, inner channels, FFN widths and the vocabulary.', SIZE),
        'slices': Option(
            1, 'Groups of hosts that a slow network joins; mesh.data, then mesh.fsdp, goes across it, no other axis.',
            POSITIVE,
        ),
        'rules': Option(
            (), 'Changes to the table of what splits a dimension: "LOGICAL=AXIS+AXIS", such as "embed=fsdp+expert", or "LOGICAL=" for none;'
            ' several are separated by "/".',
            element=str, between='[,/]',
        ),
        'cpu_devices': Option(0, 'On CPU, how many XLA devices to make; 0 leaves JAX\'s default.', COUNT),
    }),
}  # fmt: skip


def leaves(options: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Option]]:
    """Yields ``(dotted key, option)`` for every option of a table."""
    for name, option in options.items():
        if isinstance(option, Option):
            yield prefix + name, option
        else:
            yield from leaves(option, f'{prefix}{name}.')
