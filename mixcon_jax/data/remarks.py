"""What a person should know about stores before training on them."""

from collections.abc import Iterator, Sequence

from mixcon_jax.data.cache import split_is_the_hash
from mixcon_jax.data.documents import SPLITS
from mixcon_jax.data.prepared import PreparedStore

# How the documents of a small mixture are split.
FEW = {'cut': 'the end of each long one is held out', 'rank': 'those whose hashes are the smallest are held out'}
FAR = 3.0  # how many times the share of text that was asked for, or this part of it, is worth a word


def percent(share: float) -> str:
    """A share in percent, to two digits; only what is whole is 100 %."""
    return f'{min(round(share * 100, 2), 100 if share >= 1 else 99.99):g} %'


def remarks(stores: Sequence[PreparedStore]) -> Iterator[str]:
    """A line on everything that makes scores mean less than they seem to."""
    yield from _lost(stores)
    yield from _split(stores)
    yield from _shares(stores)


def _lost(stores: Sequence[PreparedStore]) -> Iterator[str]:
    """Text that tokens do not give back: what it costs to predict it is not known."""
    for store in stores:
        shares = store.round_trip()
        if None in shares.values():
            yield (
                f'{store.spec}: how much of the text its tokens give back was never measured, so there will be no bits'
                f' per byte; to measure it, delete {store.path} and prepare the text again'
            )
        elif min(share for share in shares.values() if share is not None) < 1:
            words = ', '.join(
                f'{percent(share)} of {split} text' for split, share in shares.items() if share is not None
            )
            yield (
                f'{store.spec}: the tokenizer loses text: of the bytes come back {words}; so there will be no bits per '
                'byte; a byte-level tokenizer (data.tokenizer=bpe) keeps everything'
            )


def _split(stores: Sequence[PreparedStore]) -> Iterator[str]:
    """Splits that other mixtures, or the other sources of this one, do not share."""
    made = [store for store in stores if store.spec.startswith('store:')]
    if len(stores) > 1:
        for store in made:
            fractions = {other.metadata.get('heldout_fraction') for other in stores}
            if len(fractions) > 1 or not split_is_the_hash(store):
                yield (
                    f'{store.spec}: its split is its own: text that it holds out may be trained on through another'
                    ' source; prepare all from their text'
                )
    for kind, what in FEW.items():
        few = [store.spec for store in stores if store not in made and store.metadata.get('split') == kind]
        if few:
            yield (
                f'{", ".join(few)}: too few documents for the hash to hold some out, so {what}; a mixture with other'
                ' text beside them may train on that'
            )


def _shares(stores: Sequence[PreparedStore]) -> Iterator[str]:
    """Documents are held out whole, so a share of documents may be quite another share of the text."""
    records = [store.metadata for store in stores]
    train, heldout = (sum(record['counts'][split]['bytes'] for record in records) for split in SPLITS)
    total = max(train + heldout, 1)
    sizes = [sum(record['counts'][split]['bytes'] for split in SPLITS) for record in records]
    # Each store has the fraction that it was prepared with.
    fraction = sum(record['heldout_fraction'] * size for record, size in zip(records, sizes, strict=True)) / total
    share = heldout / total
    if share > FAR * fraction or share < fraction / FAR or 1 - share < (1 - fraction) / FAR:
        yield (
            f'{heldout:,} of {train + heldout:,} bytes are held out, {percent(share)}, where data.heldout_fraction is'
            f' {percent(fraction)}: documents are held out whole, however long; cut long ones into several files or '
            'records, or add documents'
        )
