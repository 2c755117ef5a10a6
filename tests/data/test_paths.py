"""Patterns: as Python's glob expands them, but each file once, whatever leads to it, and literal names as they are."""

import errno
import glob
import os
import random

import pytest

from mixcon_jax.data.paths import given, match, once
from mixcon_jax.data.sources import open_source
from mixcon_jax.errors import UserError


@pytest.mark.parametrize('pattern', ['*', '*.txt', 'a/*', '**/*.txt', '**', 'a/**/b/*', '?/[ab].*', '.*', 'a/a/a.txt'])
def test_without_links_it_is_glob(tmp_path, pattern, monkeypatch):
    draw = random.Random(3)
    for _ in range(60):
        folder = tmp_path.joinpath(*draw.choices(['a', 'b', '.c'], k=draw.randrange(4)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / draw.choice(['a.txt', 'b.txt', '.d.txt', 'e.md'])).touch()
    (tmp_path / 'a' / 'a').mkdir(parents=True, exist_ok=True)
    (tmp_path / 'a' / 'a' / 'a.txt').touch()
    monkeypatch.chdir(tmp_path)
    for spelled in (pattern, f'{tmp_path}/{pattern}'):
        expected = sorted(path for path in glob.glob(spelled, recursive=True) if os.path.isfile(path))
        if expected:
            assert match(spelled) == expected
        else:
            with pytest.raises(UserError, match='no file matches'):
                match(spelled)


def test_each_file_is_found_once_whatever_leads_to_it(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name in ('x.txt', 'deep/y.txt'):
        (tmp_path / name).write_text(name)
    (tmp_path / '0again').symlink_to('.')
    (tmp_path / 'deep' / 'up').symlink_to('..')  # two loops: the ways through them have no end
    (tmp_path / 'deep' / 'twin.txt').symlink_to('../x.txt')
    (tmp_path / 'z.txt').hardlink_to(tmp_path / 'deep' / 'y.txt')
    (tmp_path / 'broken').symlink_to('nowhere')  # of no name that is asked for
    assert match(f'{tmp_path}/**/*.txt') == [f'{tmp_path}/x.txt', f'{tmp_path}/z.txt']
    assert [document.text for document in open_source(f'files:{tmp_path}/**/*.txt')] == ['x.txt', 'deep/y.txt']
    twice = [f'{tmp_path}/deep/twin.txt', f'{tmp_path}/z.txt', f'{tmp_path}/x.txt', f'{tmp_path}/0again/x.txt']
    assert once(twice) == [f'{tmp_path}/x.txt', f'{tmp_path}/z.txt']


@pytest.mark.parametrize('folder', ['a[1]', 'a,b', 'a b', "it's", '[x', 'ä'])
def test_what_exists_as_it_is_spelled_is_meant_literally(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for name in ('c[2].txt', 'c2.txt'):
        (tmp_path / folder / name).touch()
    assert match(f'{tmp_path}/{folder}/c[2].txt') == [f'{tmp_path}/{folder}/c[2].txt']
    assert len(match(f'{tmp_path}/{folder}/*.txt')) == 2
    assert match(f'{tmp_path}/{folder}/c[23].txt') == [f'{tmp_path}/{folder}/c2.txt']


def test_what_cannot_be_reached_is_refused(tmp_path, monkeypatch):
    """Left out silently it would be missing from the data."""
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for path in (tmp_path / 'a' / 'b' / 'x.txt', tmp_path / 'y.txt'):
        path.touch()
    for target in ('nowhere', 'broken.txt'):
        (tmp_path / 'broken.txt').symlink_to(target)
        for pattern in ('**/*.txt', '*', 'broken.txt'):
            with pytest.raises(UserError, match=r'broken.txt: a link that leads nowhere'):
                match(f'{tmp_path}/{pattern}')
        (tmp_path / 'broken.txt').unlink()
    assert len(match(f'{tmp_path}/**/*.txt')) == 2

    # A folder that can be listed and not entered; whoever runs the tests may be allowed everything.
    def denied(original):
        def look(path, *given, **options):
            if isinstance(path, str) and path.startswith(f'{tmp_path}/a/'):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return original(path, *given, **options)

        return look

    for name in ('stat', 'lstat'):
        monkeypatch.setattr(os, name, denied(getattr(os, name)))
    for pattern in ('**/*.txt', 'a/*/*.txt', 'a/b/x.txt', 'a/*'):
        with pytest.raises(UserError, match=r'/a/b.*: Permission denied'):
            match(f'{tmp_path}/{pattern}')
    assert match(f'{tmp_path}/*.txt') == [f'{tmp_path}/y.txt']


@pytest.mark.parametrize('name', ['a*.txt', '?.txt', '**', 'a[b].txt', '~.txt'])
def test_an_argument_that_exists_is_that_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for each in (name, 'ab.txt', 'b.txt'):
        (tmp_path / each).touch()
    assert given(f'{tmp_path}/{name}') == [f'{tmp_path}/{name}']
    assert given('*b.txt') == ['ab.txt', 'b.txt']


@pytest.mark.parametrize('argument, words', [('', "no file matches ''"), ('x/*.txt', "no file matches 'x/*.txt' ")])
def test_what_is_said_of_arguments_is_said_of_them(tmp_path, argument, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        given(argument)
    assert words in str(error.value) and 'sources' not in str(error.value)
    with pytest.raises(UserError, match=rf"^'{tmp_path}' is a folder; name its files: {tmp_path}/\*\*/\*.txt$"):
        given(str(tmp_path))


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b'/caf\xe9.txt'
    try:
        with open(name, 'w') as file:
            file.write('text')
    except OSError:
        pytest.skip('this file system wants UTF-8')
    source = open_source(f'files:{tmp_path}/*.txt')
    assert [document.text for document in source] == ['text']
    assert [document.text for document in source.sample(10)] == ['text'] and source.fingerprint()


@pytest.mark.parametrize('spec', ['~nobody-of-this-name/*.txt', '~nobody-of-this-name/a.txt'])
def test_homes_that_do_not_exist(spec):
    with pytest.raises(UserError, match='~nobody-of-this-name'):
        match(spec)
