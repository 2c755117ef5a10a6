"""Loads what `exports.py` exported with Hugging Face transformers, whose logits must be those that stand beside it.

Runs in the environment of `make parity`, which has no JAX: `python tests/parity/load_exports.py DIR`.
"""

import os
import pathlib
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # all is here

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

TOLERANCE = {'float32': 1e-5, 'bfloat16': 5e-2}  # of the largest logit


def main(folder: pathlib.Path) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = 0
    for file in sorted(folder.glob('*.npz')):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder / file.stem,
            output_loading_info=True,
            dtype='auto',
            attn_implementation='eager',
            experts_implementation='eager',
        )
        dtype = str(model.dtype).removeprefix('torch.')
        with np.load(file) as arrays, torch.no_grad():
            theirs = model.double().eval()(input_ids=torch.from_numpy(arrays['tokens']).long(), use_cache=False).logits
            difference = np.abs(theirs.numpy() - arrays['y']).max() / np.abs(arrays['y']).max()
        tokenizer = AutoTokenizer.from_pretrained(folder / file.stem)
        left = [name for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys') for name in info[kind]]
        good = difference <= TOLERANCE[dtype] and not left and tokenizer('w3 w2')['input_ids'] == [0, 3, 2]
        print(f'{file.stem:24} {type(model).__name__:24} {dtype:9} logits differ by {difference:.1e}', *left)
        failed += not good
    return failed


if __name__ == '__main__':
    sys.exit(main(pathlib.Path(sys.argv[1])))
