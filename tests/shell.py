# SPDX-License-Identifier: Apache-2.0
"""Bundles run as their users run them: ``python -m monai.bundle run``, in this process or from the shell."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fire
import monai.bundle.__main__ as program
import monai.utils.misc
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"


def configs(bundle: str, name: str, *overlays: str) -> list[str]:
    """Files of a configuration, as ``--config_file`` takes them."""
    return [str(BUNDLES / bundle / file) for file in (f"{name}.json", *overlays)]


def parse(files: Sequence[str], **overrides: Any) -> ConfigParser:
    """A configuration whose parts are to be looked at."""
    parser = ConfigParser()
    parser.read_config(files)
    parser.update({key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()})
    return parser


def workflow(files: Sequence[str], workflow_type: str, **overrides: Any) -> ConfigWorkflow:
    """MONAI's workflow of a configuration, with the loggers as they are."""
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    return ConfigWorkflow(list(files), workflow_type=workflow_type, logging_file=False, **overrides)


def run_parsed(run_id: str, files: Sequence[str], **overrides: Any) -> ConfigParser:
    """Run a configuration with what a command line cannot say, such as objects."""
    parser = parse(files, **overrides)
    with as_before():
        parser.get_parsed_content("initialize")
        parser.get_parsed_content(run_id)
    return parser


def run_bundle(run_id: str, config_file: object, folder: Path, **overrides: object) -> subprocess.CompletedProcess:
    """
    ``python -m monai.bundle run`` in a folder, in this process: Fire gets the words that the shell would give it. Much
    faster than a new interpreter; what a run leaves behind in an interpreter is put back.
    """
    words = _words(run_id, config_file, overrides)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with as_before(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(folder)
        sys.argv[:] = [str(program.__file__), *words]
        _log_to_stdout()
        try:
            # as the program does it, but for a look at the stack that takes as long as a small run
            fire.Fire(vars(program))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except Exception:
            code = 1
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    _log_to_stdout()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_bundle_in_shell(
    run_id: str, config_file: object, folder: Path, launcher: Sequence[str] = (), **overrides: object
) -> subprocess.CompletedProcess:
    """The same in an interpreter of its own, on one thread; ``launcher`` are words of Python before it."""
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "monai.bundle", *_words(run_id, config_file, overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def run_bundle_in_two(
    run_id: str, config_file: object, folder: Path, **overrides: object
) -> list[subprocess.CompletedProcess]:
    """
    :py:func:`run_bundle` in two new processes that know of each other as those of ``torchrun`` do. They are forked from
    an interpreter that has imported all and done nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["monai_deq", "shell"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ProcessPoolExecutor(2, context, _join_group, (context.Value("i", 0), port)) as pool:
        runs = [pool.submit(run_bundle, run_id, config_file, folder, **overrides) for _ in range(2)]
        return [run.result(timeout=300) for run in runs]


def _join_group(ranks: Any, port: str) -> None:
    torch.set_num_threads(1)
    with ranks.get_lock():
        rank, ranks.value = str(ranks.value), ranks.value + 1
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(group)


def output_of(result: subprocess.CompletedProcess) -> str:
    """What a command printed that ended well."""
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


def error_of(result: subprocess.CompletedProcess) -> str:
    """The reason that a command which ended in an error gave last, behind the traceback."""
    assert result.returncode != 0, result.stdout[-2000:] + result.stderr[-6000:]
    before, line = result.stderr.rstrip("\n").rsplit("\n", 1)
    assert "Traceback (most recent call last)" in before and line.startswith("Error: "), result.stderr[-6000:]
    return line.removeprefix("Error: ")


def assert_equal(a: Any, b: Any, name: str = "") -> None:
    """Bit by bit, whatever it is."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, both in enumerate(zip(a, b, strict=True)):
            assert_equal(*both, f"{name}.{i}")
    else:
        assert a == b, name


def _words(run_id: str, config_file: object, overrides: dict[str, object]) -> list[str]:
    words = ["run", run_id, "--config_file", str(config_file)]
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return words


def _loggers() -> list[logging.Logger]:
    others = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    return [logging.root, *others]


def _log_to_stdout() -> None:
    """Where MONAI's loggers write in a new interpreter; they keep to what it was when they were made."""
    for logger in _loggers():
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stdout  # the earlier one may be closed, setStream would flush it


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Put back what a run sets for a whole interpreter: folder, paths, hook, loggers, random states, determinism."""
    folder, argv, path, hook = Path.cwd(), list(sys.argv), list(sys.path), sys.excepthook
    logs = [(x, x.level, list(x.handlers), x.disabled, x.propagate) for x in _loggers()]
    states, numpy_state = random.getstate(), np.random.get_state()
    seed, cudnn = monai.utils.misc.get_seed(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(folder)
        sys.argv[:], sys.path[:], sys.excepthook = argv, path, hook
        for logger, level, handlers, disabled, propagate in logs:
            logger.setLevel(level)
            logger.handlers[:] = handlers
            logger.disabled, logger.propagate = disabled, propagate
        random.setstate(states)
        np.random.set_state(numpy_state)
        monai.utils.misc._seed = seed
        cudnn.deterministic, cudnn.benchmark = flags
