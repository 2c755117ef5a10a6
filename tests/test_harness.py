"""What a run answers to lm_eval: likelihoods of continuations and texts, and greedy continuations up to a stop."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mixcon_jax import cli
from mixcon_jax.errors import UserError
from mixcon_jax.inference import harness
from mixcon_jax.inference.generate import Sampling, generate, generate_text
from mixcon_jax.inference.harness import Answers, windows
from mixcon_jax.inference.likelihood import Ending, likelihoods
from mixcon_jax.inference.load import load_model
from mixcon_jax.train import train
from tests.tiny import tiny_config

OPTIONS = {
    'model__attention__num_kv_heads': 2,
    'train__steps': 4,
    'eval__every': 0,
    'optim__learning_rate': 0.02,
    'model__init_std': 0.3,
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    train(tiny_config(folder, model__pattern=('mamba', 'attention+mlp'), **OPTIONS), folder / 'run')
    return folder / 'run'


@pytest.fixture(scope='module')
def trained(run):
    return load_model(run)


def asked(*requests):
    return [SimpleNamespace(args=request) for request in requests]


def test_a_continuation_has_the_likelihood_of_its_tokens_behind_the_context(trained):
    words, model = trained.tokenizer, trained.model
    pairs = [('the state of', ' a loop'), ('', 'gains'), ('and noise ', 'while'), ('a', ''), ('the loop ' * 40, 'of a')]
    found = Answers(trained, 4, 32).loglikelihood(asked(*pairs))
    endings = []
    for context, continuation in pairs:
        whole, before = words.encode(context + continuation), words.encode(context.rstrip())
        assert words.decode(whole[len(before) :]) == (' ' if context.endswith(' ') else '') + continuation
        endings.append(Ending([0, *whole][-33:], len(whole) - len(before)))
    endings[3] = Ending(endings[3].tokens, 1)  # of nothing, the last token of the context
    for (log, greedy), wanted in zip(found, likelihoods(model, endings, 1), strict=True):
        assert log == pytest.approx(wanted.log, rel=1e-5) and greedy == wanted.greedy


def test_of_a_long_text_each_token_is_scored_once_from_as_many_before_it_as_fit(trained):
    text, short = 'the state of a loop while gains route tokens ' * 5, 'noise'
    tokens = [0, *trained.tokenizer.encode(text)]
    assert len(tokens) > 70
    cut = list(windows(tokens, 32))
    assert [ending.scored for ending in cut][:2] == [32, 32] and sum(ending.scored for ending in cut) == len(tokens) - 1
    assert [len(ending.tokens) for ending in cut] == [33] * len(cut)  # of which the last one predicts nothing
    assert [t for ending in cut for t in ending.tokens[len(ending.tokens) - ending.scored :]] == tokens[1:]
    assert list(windows([0, 5, 6], 32)) == [([0, 5, 6], 2)] and not list(windows([0], 32))
    found = Answers(trained, 2, 32).loglikelihood_rolling(asked((text,), ('',), (short,)))
    assert found[0] == pytest.approx(sum(one.log for one in likelihoods(trained.model, cut, 1)), rel=1e-5)
    assert found[1] == 0 and found[2] == pytest.approx(Answers(trained, 1, 32).loglikelihood(asked(('', short)))[0][0])


def test_continuations_are_greedy_and_end_before_the_first_stop(run, trained, capsys):
    prompts = ['the state', 'of a', 'while the gains']
    texts = generate_text(run, prompts, max_new_tokens=12, num_samples=1, sampling=Sampling(0), seed=0)
    whole = [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]
    lines = []
    answers = Answers(trained, 2, 64, lines.append)
    free = {'until': [], 'max_gen_toks': 12}
    assert answers.generate_until(asked(*((prompt, free) for prompt in prompts))) == whole
    assert lines == ['2 of 3 texts continued', '3 of 3 texts continued']
    stop = whole[0][3:5]
    first, second = answers.generate_until(asked((prompts[0], free | {'until': ['\n\n\n', stop]}), (prompts[1], free)))
    assert first == whole[0].split(stop)[0] and len(first) < len(whole[0]) and second == whole[1]
    sampled = free | {'do_sample': True, 'temperature': 3.0, 'until': stop}
    assert len({answers.generate_until(asked((prompts[0], each)))[0] for each in (sampled, free)}) == 2


def test_only_what_is_asked_for_keeps_a_batch_going(trained, monkeypatch):
    """One text that ends at once, in a batch of eight."""
    steps = []

    def counted(*arguments):
        for tokens in generate(*arguments):
            steps.append(tokens)
            yield tokens

    monkeypatch.setattr(harness, 'generate', counted)
    answers = Answers(trained, 8, 64)
    whole = answers.generate_until(asked(('the state', {'max_new_tokens': 9, 'top_k': -1, 'temperature': None})))[0]
    assert len(steps) <= 9 and whole
    steps.clear()
    assert answers.generate_until(asked(('the state', {'until': [whole[0]], 'max_tokens': 9}))) == ['']
    assert len(steps) <= 3


def test_one_question_asked_again_is_answered_by_draws_of_its_own(trained):
    """Also in another batch, as the best of several answers is asked for."""
    options = {'do_sample': True, 'temperature': 3.0, 'max_gen_toks': 9}
    found = Answers(trained, 2, 64).generate_until(asked(*[('the state', options)] * 6))
    assert len(set(found)) == 6 and found == Answers(trained, 4, 64).generate_until(
        asked(*[('the state', options)] * 6)
    )


def test_half_a_character_is_no_fault(trained):
    assert Answers(trained, 1, 32).loglikelihood(asked(('a \ud800', ' b')))[0][0] < 0


def test_likelihoods_on_a_mesh_are_those_of_one_device_also_in_batches_that_it_does_not_divide(run, trained):
    pairs = asked(('the state of', ' a loop'), ('', 'gains'), ('and noise', ' while the gains route'))
    found = Answers(load_model(run, mesh=('mesh.fsdp=2', 'mesh.tensor=2')), 3, 32).loglikelihood(pairs)
    for (log, greedy), (wanted, is_greedy) in zip(found, Answers(trained, 1, 32).loglikelihood(pairs), strict=True):
        assert log == pytest.approx(wanted, rel=1e-4) and greedy == is_greedy


def test_what_does_not_fit_is_refused_by_the_option(trained):
    with pytest.raises(UserError, match=r'^a continuation has \d+ tokens, more than --max-length 4$'):
        Answers(trained, 1, 4).loglikelihood(asked(('a', 'the state of a loop while gains')))
    with pytest.raises(UserError, match=r'^the task generates 256 tokens, .* in the 32 that are read; give'):
        Answers(trained, 1, 32).generate_until(asked(('a', {'until': '.'})))


@pytest.mark.parametrize(
    'given, message',
    [
        (['--limit', '0'], '--limit 0 must be at least 1'),
        (['--num-fewshot', '-1'], '--num-fewshot -1 must be at least 0'),
        ([], 'install the extra lm-eval: bash launch/bootstrap.sh lm-eval'),
    ],
)
def test_the_command_refuses_in_one_line(run, given, message, monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'lm_eval', None)
    with pytest.raises(SystemExit, match='2'):
        cli.main(['lm-eval', '--workdir', str(run), '--tasks', 'a', *given])
    assert message in capsys.readouterr().err


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
{more}
"""
KINDS = {
    'choices': ('multiple_choice', 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"', 'acc'),
    'perplexities': (
        'loglikelihood_rolling',
        'doc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]',
        'bits_per_byte',
    ),
    'continuations': (
        'generate_until',
        'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
        'metric_list: [{metric: exact_match}]',
        'exact_match',
    ),
}


@pytest.fixture
def tasks(tmp_path, trained):
    """Tasks of one's own, of questions that lie in a file, and what comes out for each."""
    pytest.importorskip('lm_eval', reason='needs the extra lm-eval')
    answers = Answers(trained, 1, 32)
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        text = ' '.join(rng.choice(['the', 'state', 'loop', 'gains'], 4))
        rows.append({'text': text, 'choices': [' noise', ' of a', ' tokens'], 'label': i % 3})
        rows[-1]['answer'] = (
            answers.generate_until(asked((text, {'until': '.', 'max_gen_toks': 8})))[0] if i % 2 else '?'
        )
    file = tmp_path / 'questions.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name, (kind, more, _) in KINDS.items():
        (tmp_path / f'{name}.yaml').write_text(TASK.format(name=name, file=file, kind=kind, more=more))
    likeliest = []
    for row in rows:
        logs = [log for log, _ in answers.loglikelihood(asked(*((row['text'], ' ' + c) for c in row['choices'])))]
        likeliest.append(int(np.argmax(logs)) == row['label'])
    bits = -sum(answers.loglikelihood_rolling(asked(*((row['text'],) for row in rows)))) / np.log(2)
    size = sum(len(row['text'].encode()) for row in rows)
    return tmp_path, {'choices': np.mean(likeliest), 'perplexities': bits / size, 'continuations': 0.5}


def test_tasks_of_ones_own_by_the_command(run, tasks, tmp_path, capsys):
    """Needs the extra lm-eval; what it asks of a run is tested without it above."""
    folder, wanted = tasks
    results = tmp_path / 'out' / 'results.json'
    arguments = ['--include-path', str(folder), '--json', str(results), '--batch-size', '3']
    with pytest.raises(SystemExit, match='0'):
        cli.main(['lm-eval', '--workdir', str(run), '--tasks', *KINDS, *arguments])
    shown, found = capsys.readouterr(), json.loads(results.read_text())
    assert found['step'] == 4 and found['workdir'] == str(run)
    for name, (_, _, metric) in KINDS.items():
        assert found['results'][name][f'{metric},none'] == pytest.approx(wanted[name], rel=1e-4)
        assert name in shown.out
    assert 'texts scored' in shown.err
    with pytest.raises(SystemExit, match='2'):
        cli.main(['lm-eval', '--workdir', str(run), '--tasks', 'choices,choises', *arguments])
    assert "lm_eval has no task 'choises'" in capsys.readouterr().err


@pytest.mark.parametrize(
    'change, arguments, message',
    [
        (('{{text}}', '{{nofield}}'), [], r"UndefinedError: 'nofield' is undefined"),
        (('', ''), ['--num-fewshot', '9'], 'lm_eval cannot run choices: '),
    ],
)
def test_a_task_that_cannot_be_run_is_no_fault_of_ours(run, tasks, change, arguments, message, capsys):
    file = tasks[0] / 'choices.yaml'
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(SystemExit, match='2'):
        cli.main(['lm-eval', '--workdir', str(run), '--tasks', 'choices', '--include-path', str(tasks[0]), *arguments])
    error = capsys.readouterr().err
    assert 'lm_eval cannot run choices: ' in error and message in error
