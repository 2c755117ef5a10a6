"""Records, their repair after a kill, TensorBoard drawn from them, the progress line, goodput and peaks."""

import errno
import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError
from mixcon_jax.models.reported import RECORDED
from mixcon_jax.planning.hardware import peak_flops
from mixcon_jax.runs.goodput import KINDS, Clock
from mixcon_jax.runs.metrics import Metrics, Progress, round_down
from mixcon_jax.runs.records import RecordLog, keep_until, last, plain, read
from mixcon_jax.runs.run import Run
from mixcon_jax.runs.writers import TensorBoard, scalars
from mixcon_jax.units import duration, short
from mixcon_jax.watching import follow


class FakeTime:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def write(path, steps, kind='train'):
    log = RecordLog(path)
    for step in steps:
        log.append(kind, step, {'loss': np.float32(1 / (step + 1))})
    log.close()


# ----- records -----


@pytest.mark.parametrize('seed', range(5))
def test_a_float32_is_written_so_that_equal_text_is_equal_bits(seed):
    bits = np.random.default_rng(seed).integers(0, 2**32, 200, dtype=np.uint32)
    values = bits.view(np.float32)
    for value in values[np.isfinite(values)]:
        text = json.dumps(plain(jnp.asarray(value)))
        assert np.float32(json.loads(text)).tobytes() == value.tobytes() or value == 0
    assert plain(np.float32('nan')) is None and plain(math.inf) is None
    assert plain({'a': [np.int32(3), np.bool_(True)], 'b': jnp.array([1.0, jnp.nan])}) == {
        'a': [3, True],
        'b': [1, None],
    }


@pytest.mark.parametrize('torn', [b'', b'{"kind": "train", "st', b'{"kind": "train"}', b'\xff\xfe', b'[1]', b'null'])
def test_going_on_drops_later_records_and_torn_lines(tmp_path, torn):
    path = tmp_path / 'metrics.jsonl'
    write(path, range(1, 8))
    with open(path, 'ab') as file:
        file.write(torn)
    assert [record['step'] for record in read(path)] == list(range(1, 8))
    assert [record['step'] for record in keep_until(path, 5)] == [1, 2, 3, 4, 5]
    write(path, [6, 7])
    lines = path.read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


def test_a_record_cut_off_at_any_byte_is_repaired(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, [1, 2])
    whole = path.read_bytes()
    first = whole.index(b'\n') + 1
    for cut in range(first, len(whole) - 1):
        path.write_bytes(whole[:cut])
        keep_until(path, 9)
        assert path.read_bytes() in (whole[:first], whole)


NO_RECORDS = [
    b'', b'null', b'[1]', b'\xff', b'[' * 100_000, b'{"kind": "run"}', b'{"step": 1}', b'{"kind": 3, "step": 1}',
    b'{"kind": "run", "step": "3"}', b'{"kind": "run", "step": null}', b'{"kind": "run", "step": true}',
    b'{"kind": "run", "step": -1}', b'{"kind": "run", "step": 1.0}', b'{"kind": "run", "step": 1' + b'0' * 400 + b'}',
    b'{"kind": "train", "step": 1}', b'{"kind": "eval", "step": 1, "loss": 1.0}', b'{"kind": "final", "step": 1}',
    b'{"kind": "train", "step": 1, "loss": "x"}', b'{"kind": "train", "step": 1, "loss": 1, "time": {}}',
    b'{"kind": "run", "step": 1, "time": 1e300}', b'{"kind": "run", "step": 1, "time": -1}',
    b'{"kind": "train", "step": 1, "loss": 1, "stats": 3}', b'{"kind": "run", "step": 1, "baselines": null}',
]  # fmt: skip


@pytest.mark.parametrize('line', NO_RECORDS, ids=lambda line: line[:50])
def test_a_line_that_is_no_record_is_none_for_everyone(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    write(path, [1, 2])
    path.write_bytes(line + b'\n' + path.read_bytes() + line + b'\n')
    assert [record['step'] for record in read(path)] == [1, 2] == [record['step'] for record in keep_until(path, 9)]
    run = Run(tmp_path)
    assert run.update() and run.step == 2
    path.write_bytes(line + b'\n')
    (tmp_path / 'config.json').write_text('{}')
    (run,) = follow.Runs([tmp_path]).update()
    assert (run.step, run.train, run.scores, run.event) == (0, None, None, None)


@pytest.mark.parametrize('value', [None, 3, 'x', [], {}, [[]], [{}], {'a': None}, {'a': 'x'}, {'a': [1, [2]]}, 10**400])
@pytest.mark.parametrize('key', ['stats', 'time_shares', 'by_length', 'accuracy', 'mfu', 'x'])
def test_whatever_a_record_holds_is_drawn_or_left_out(tmp_path, key, value):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(json.dumps({'kind': 'train', 'step': 1, 'loss': 2.5, key: value}) + '\n')
    for record in read(path):
        TensorBoard(tmp_path / 'tensorboard', [record]).close()
        assert scalars(record)['train/loss'] == 2.5


def test_no_file_is_no_records(tmp_path):
    assert read(tmp_path / 'none') == [] and keep_until(tmp_path / 'none', 3) == []
    assert last([], kind='eval') is None
    assert last(
        [{'kind': 'eval', 'step': 1}, {'kind': 'eval', 'step': 2}, {'kind': 'run', 'step': 3}], kind='eval'
    ) == {
        'kind': 'eval',
        'step': 2,
    }


# ----- goodput and peaks -----


def test_clock_splits_time_and_counts_inner_time_once():
    now = FakeTime()
    clock = Clock(now)
    with clock.spend('startup'):
        now.wait(10)
    with clock.spend('evaluation'):
        now.wait(2)
        with clock.spend('compile'):
            now.wait(5)
        now.wait(1)
    now.wait(20)
    with clock.spend('data'):
        now.wait(2)
    assert clock.seconds == {'startup': 10, 'compile': 5, 'data': 2, 'checkpoint': 0, 'evaluation': 3}
    assert clock.total() == 40 and clock.training() == 22
    shares = clock.shares()
    assert shares['goodput'] == pytest.approx(0.5) and sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {'goodput', *KINDS}


@pytest.mark.parametrize(
    'kind, expected',
    [
        ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12),
        ('NVIDIA H20', 148e12), ('NVIDIA GeForce GTX 1080', None),
        ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA B200', 2250e12), ('NVIDIA L4', 121e12), ('NVIDIA L40S', 362e12),
        ('NVIDIA A10G', 70e12), ('NVIDIA A10', 125e12), ('Tesla V100-SXM2-16GB', 125e12), ('TPU v4', 275e12),
        ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v5p', 459e12),
        ('NVIDIA GeForce RTX 4090', 165.2e12), ('cpu', None),
    ],
)  # fmt: skip
def test_peaks_by_device_kind(kind, expected):
    assert peak_flops(kind) == expected


# ----- metrics -----


def config_of(**log):
    config = configs.default()
    config.log.update(log)
    config.train.steps = 20
    config.optim.warmup_steps = 1
    return configs.validate(config)


def step_metrics(step):
    stats = {'layer_1/moe_load': jnp.array([[0.25, 0.75]]), 'layer_0/kappa': jnp.ones(1)}
    return {
        'loss': jnp.float32(5 / step), 'tokens': jnp.int32(100), 'bad': jnp.bool_(False), 'bad_steps': jnp.int32(0),
        'grad_norm': jnp.float32(1), 'stats': stats,
    }  # fmt: skip


def run(folder, config, first, final, stream=None, active=True, now=None):
    """A start of a run that makes steps first + 1 .. final in one second each."""
    now = now or FakeTime()
    metrics = Metrics(folder, config, Clock(now), 1e6, 1e9, active=active, stream=stream or io.StringIO())
    kept = metrics.start(first, 100 * first)
    for step in range(first + 1, final + 1):
        now.wait(1)
        metrics.train(step, step_metrics(step))
        if step % 10 == 0:
            metrics.record('eval', step, loss=2.0, bits_per_byte=1.5, tokens=9, bytes=18)
    metrics.sync()
    metrics.close()
    return kept


def test_records_are_due_at_the_same_steps_wherever_a_start_begins(tmp_path):
    config = config_of(every=4, tensorboard=False)
    (tmp_path / 'whole').mkdir()
    (tmp_path / 'parts').mkdir()
    run(tmp_path / 'whole', config, 0, 20)
    for first, final in ((0, 7), (4, 11), (10, 13), (10, 20)):
        run(tmp_path / 'parts', config, first, final)
    timeless = lambda record: {
        key: value for key, value in record.items()
        if key not in ('time', 'goodput', 'time_shares', 'tokens_per_second', 'flops_per_second', 'mfu')
    }  # fmt: skip
    whole, parts = ([timeless(r) for r in read(tmp_path / name / 'metrics.jsonl')] for name in ('whole', 'parts'))
    assert whole == parts
    assert [r['step'] for r in whole if r['kind'] == 'train'] == [1, 4, 8, 12, 16, 20]
    assert whole[0]['stats'] == {'layer_1/moe_load': [[0.25, 0.75]], 'layer_0/kappa': [1.0]}


def test_no_name_in_a_record_of_training_is_free_for_a_layers_loss(tmp_path):
    run(tmp_path, config_of(every=4, tensorboard=False), 0, 20)
    newest = last(read(tmp_path / 'metrics.jsonl'), kind='train')
    assert {'mfu', 'goodput', 'tokens_seen', *step_metrics(1)} <= newest.keys() <= RECORDED


def test_rates_leave_out_the_first_step_and_what_is_no_training(tmp_path):
    now = FakeTime()
    clock = Clock(now)
    metrics = Metrics(tmp_path, config_of(every=5, tensorboard=False), clock, 1e6, 1e9, stream=io.StringIO())
    metrics.start(0)
    for step in range(1, 11):
        with clock.spend('compile'):
            now.wait(50 if step == 1 else 0)
        with clock.spend('evaluation'):
            now.wait(30 if step == 7 else 0)
        now.wait(0.5)
        metrics.train(step, step_metrics(step))
    metrics.close()
    first, *rest = read(tmp_path / 'metrics.jsonl')
    assert 'tokens_per_second' not in first and 'mfu' not in first
    for record in rest:
        assert record['tokens_per_second'] == pytest.approx(200)
        assert record['flops_per_second'] == pytest.approx(200e6)
        assert record['mfu'] == pytest.approx(0.2)
    assert rest[-1]['tokens_seen'] == 1000
    assert rest[-1]['goodput'] == pytest.approx(5 / 85, abs=1e-3)


def test_other_processes_write_nothing_but_know_the_records(tmp_path):
    run(tmp_path, config_of(tensorboard=False), 0, 12)
    before = (tmp_path / 'metrics.jsonl').read_bytes()
    stream = io.StringIO()
    kept = run(tmp_path, config_of(), 10, 20, stream, active=False)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == before
    assert last(kept, kind='eval')['step'] == 10 and max(record['step'] for record in kept) == 10
    assert stream.getvalue() == ''


def events(folder):
    """(tag, step, value) of all TensorBoard event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        while raw:
            length = int.from_bytes(raw[:8], 'little')
            event = Event.FromString(raw[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            raw = raw[12 + length + 4 :]
    return found


def test_tensorboard_holds_what_the_records_hold_each_step_once(tmp_path):
    for first, final in ((0, 7), (4, 13), (10, 20)):
        run(tmp_path, config_of(every=1), first, final)
    steps = [step for tag, step, _ in events(tmp_path / 'tensorboard') if tag == 'train/loss']
    assert steps == list(range(1, 21))
    values = {(tag, step): value for tag, step, value in events(tmp_path / 'tensorboard')}
    assert values['train/loss', 8] == pytest.approx(5 / 8)
    assert values['stats/layer_1/moe_load', 8] == pytest.approx(0.75)
    assert values['eval/loss', 20] == pytest.approx(2)
    assert len(values) == len(events(tmp_path / 'tensorboard'))


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path, monkeypatch):
    def full(self, event):
        raise OSError(errno.ENOSPC, 'No space left on device')

    metrics = Metrics(tmp_path, config_of(every=1), Clock(), stream=io.StringIO())
    metrics.start(0)
    monkeypatch.setattr('tensorboardX.event_file_writer.EventsWriter.write_event', full)
    with pytest.raises(UserError, match=r'tensorboard: No space left'):
        metrics.train(1, step_metrics(1))
    metrics.close()


def test_scalars_pass_over_what_is_not_finite(tmp_path):
    record = {'kind': 'train', 'step': 3, 'time': 1.0, 'loss': None, 'bad': True, 'tokens': 4}
    assert scalars(record) == {'train/bad': 1.0, 'train/tokens': 4.0}
    assert scalars({'kind': 'run', 'step': 3, 'seconds': 4.0}) == {}
    TensorBoard(tmp_path / 'tensorboard', [record]).close()


def test_wandb_without_the_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'mixcon-jax\[wandb\]'):
        Metrics(tmp_path, config_of(wandb=True, tensorboard=False), Clock())
    assert not list(tmp_path.iterdir())


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    import sys
    import types

    started, logged = [], []
    wandb = types.ModuleType('wandb')
    wandb.init = lambda **options: (
        started.append(options)
        or types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: object())
    for first, final in ((0, 3), (2, 4)):
        run(tmp_path, config_of(every=1, wandb=True, tensorboard=False), first, final)
    assert started[0]['id'] == started[1]['id'] and started[0]['resume'] == 'allow'
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4]
    assert logged[0][1]['train/loss'] == 5.0


# ----- the progress line -----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_rewrites_itself_and_messages_stand_above(monkeypatch):
    now = FakeTime()
    monkeypatch.setattr('time.monotonic', now)
    stream = Terminal()
    progress = Progress(100, stream)
    for step in range(1, 51):
        now.wait(0.05)
        progress.update(step, 3.25, 100 * step, 0.1 * step, 0.25)
    progress.say('hello')
    now.wait(1)
    progress.update(51, 3.2, 5100, 5.1)
    progress.end()
    text = stream.getvalue()
    assert text.count('\n') == 2  # after the message and at the end
    assert text.split('\r')[-2].rstrip() == 'hello'
    assert re.search(r'\rstep 4\d/100 · loss 3\.2500 · 1k tokens/s · MFU 25\.0 % · [56]s left', text)
    assert 10 <= text.count('\r') <= 20  # five times a second at most


def test_elsewhere_it_is_a_few_dozen_lines():
    stream = io.StringIO()
    progress = Progress(1000, stream)
    for step in range(1, 1001):
        progress.update(step, 3.0, step, step)
    progress.end()
    lines = stream.getvalue().splitlines()
    assert 20 <= len(lines) <= 50 and lines[-1].startswith('step 1000/1000') and '\r' not in stream.getvalue()


def test_a_terminal_that_closes_ends_no_run():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, 'Input/output error')

    progress = Progress(10, Closed())
    for step in range(1, 11):
        progress.update(step, 3.0, step, step)
    progress.say('hello')
    progress.end()


def test_numbers_for_people():
    assert [round_down(n) for n in (0.1, 1, 1.9, 4.9, 5, 19, 99, 100, 2400)] == [1, 1, 1, 2, 5, 10, 50, 100, 2000]
    assert [short(n) for n in (0.5, 999, 1000, 12345, 4.56e6, 999.9e6, 1.5e12)] == [
        '0.5', '999', '1k', '12.3k', '4.56M', '1B', '1.5T',
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 59.4, 60, 185, 3600, 7830, 3.2e5, math.nan)] == [
        '0s', '59s', '1m 00s', '3m 05s', '1h 00m', '2h 10m', '3d 16h', '–',
    ]  # fmt: skip
