"""Draws a run's loss curve: `python docs/plot_loss.py runs/quickstart docs/images/quickstart.png`."""

import argparse
from pathlib import Path

import matplotlib as mpl

from mixcon_jax.runs.records import last, read

mpl.use('Agg')
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('workdir', type=Path)
    parser.add_argument('image', type=Path)
    arguments = parser.parse_args()
    records = read(arguments.workdir / 'metrics.jsonl')
    train = [record for record in records if record['kind'] == 'train']
    final = last(records, kind='final')
    done = last(records, kind='run')
    # One tokenizer: nats per token and bits per byte differ by this factor on the held-out text.
    bits = final['bits_per_byte'] / final['loss']
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    axes.plot([r['step'] for r in train], [bits * r['loss'] for r in train], lw=1, label='training batches')
    held = [record for record in records if record['kind'] in ('eval', 'final')]
    axes.plot(
        [r['step'] for r in held], [r['bits_per_byte'] for r in held], 'o-', color='black', ms=4, label='held-out text'
    )
    for name, label in (('unigram', 'byte unigrams'), ('gzip', 'gzip -9')):
        value = done['baselines'][name]
        axes.axhline(value, ls='--', lw=1, color='gray')
        axes.annotate(f'{label} {value:.2f}', (train[-1]['step'], value), ha='right', va='bottom', color='gray')
    axes.set(xlabel='step', ylabel='bits per byte', ylim=(0.8 * final['bits_per_byte'], 1.1 * bits * train[0]['loss']))
    axes.set_title(f'held out: {final["bits_per_byte"]:.3f} bits per byte after {train[-1]["step"]} steps', fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(arguments.image, dpi=110)


if __name__ == '__main__':
    main()
