"""Rewards that run on the host: guarded, put together, and called in one of two ways.

`callback` puts the call inside the jitted program (an `io_callback` per device shard, under
`shard_map`: in plain jit the same callback would gather the batch onto one process).
`submit` scores finished images in threads while the device samples the next ones.
Both return the same scores.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from flowgrpo_jax.types import Metadata, NamedScores, Reward, scope_of

log = logging.getLogger(__name__)

# score(images uint8 [M, H, W, 3], prompt ids i32 [M]) -> NamedScores of numpy arrays
Score = Callable[[np.ndarray, np.ndarray], NamedScores]


def guarded(
    name: str,
    reward: Reward,
    images: np.ndarray,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> tuple[np.ndarray, np.ndarray]:
    """Return a reward's scores f32 [B] and validity bool [B]; any failure makes images invalid.

    A reward that raises, or returns the wrong shape, invalidates its batch and is logged; a score
    that is not finite invalidates its image. Raises NeedsOverlap when the reward does: no image
    could ever be scored that way.
    """
    n = len(images)
    try:
        raw_scores, raw_valid = reward(images, prompts, metadata)
        scores, valid = np.asarray(raw_scores, np.float32), np.asarray(raw_valid, bool)
        if scores.shape != (n,) or valid.shape != (n,):
            raise ValueError(
                f"returned shapes {scores.shape} and {valid.shape} for {n} images: return a score"
                f" and a bool for each, both of shape ({n},)"
            )
    except NeedsOverlap:
        raise
    except (Exception, SystemExit):  # a library that ends the process ends no run
        log.warning("reward %r failed on %d images; they get weight 0", name, n, exc_info=True)
        return np.zeros(n, np.float32), np.zeros(n, bool)
    valid = valid & np.isfinite(scores)
    return np.where(valid, scores, 0).astype(np.float32), valid


class NeedsOverlap(RuntimeError):
    """A reward that computes with JAX was called from inside of a program."""


# Whether this thread, or the one that started it, was called from inside of a program.
inside_program: ContextVar[bool] = ContextVar("inside_program", default=False)


@contextmanager
def no_jax() -> Iterator[None]:
    """Raise NeedsOverlap, instead of waiting for ever, where this thread computes with JAX.

    The computation would wait for the device, or on the CPU for a thread of XLA's pool, which the
    program that waits for this call may hold. It is recognised when it puts its first array onto a
    device; threads that the reward itself starts are not watched.
    """
    try:
        with jax.transfer_guard_host_to_device("disallow_explicit"):
            yield
    except jax.errors.JaxRuntimeError as error:
        if "Disallowed host-to-device transfer" not in str(error):
            raise
        raise NeedsOverlap(
            "the reward computes with JAX, which it cannot do inside of a program: set"
            " reward.host_call='overlap', or make it a GraphReward"
        ) from error


GRACE = 2.0  # seconds that a program waits at its end for calls that it no longer needs
running: set[Future[Any]] = set()  # calls of rewards, and the threads' work around them


def _track(work: Future[Any]) -> Future[Any]:
    running.add(work)
    work.add_done_callback(running.discard)
    return work


class Limited:
    """A reward whose calls raise TimeoutError after `seconds`; None sets no limit.

    A thread cannot be stopped from outside. The call that took too long goes on in its own. The
    next call waits for it as long once more, so that a call that was merely slow costs its own
    images alone; after that, calls raise at once until it returns. `exit_status.ending` ends the
    process in spite of it.
    """

    def __init__(self, reward: Reward, seconds: float | None):
        self.reward, self.seconds, self.scope = reward, seconds, scope_of(reward)
        self._last: Future[Any] | None = None  # the call that was given up
        self._patience = 0.0  # the time until which the next call waits for it

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._last and not wait([self._last], self._patience - time.monotonic()).done:
            raise TimeoutError(
                "an earlier call of the reward has not returned yet: see why it hangs, or raise"
                " reward.timeout"
            )
        result: Future[Any] = _track(Future())
        work = (self._call, result, images, prompts, metadata)
        threading.Thread(target=copy_context().run, args=work, daemon=True).start()
        if not wait([result], self.seconds).done:
            self._last, self._patience = result, time.monotonic() + (self.seconds or 0.0)
            fewer = ", or lower sample.micro_batch, so that a call has fewer images"
            raise TimeoutError(
                f"no scores after reward.timeout={self.seconds:g} seconds: raise it"
                f"{fewer if self.scope == 'image' else ''}"
            )
        return result.result()

    def _call(self, result: Future[Any], *batch: Any) -> None:
        try:
            with no_jax() if inside_program.get() else nullcontext():
                scored = self.reward(*batch)
            result.set_result(scored)
        except BaseException as error:
            result.set_exception(error)


def hung() -> bool:
    """Return whether a call still runs after GRACE seconds, or when Ctrl-C ends the wait."""
    try:
        return bool(wait(tuple(running), GRACE).not_done)
    except KeyboardInterrupt:
        return True


def composite(
    rewards: Mapping[str, Reward],
    lookup: Callable[[np.ndarray], Sequence[Metadata]],
    applies: Callable[[str, Metadata], bool] = lambda name, metadata: True,
) -> Score:
    """Combine the host rewards into one function of images and prompt ids.

    Args:
      lookup: prompt ids i32 [M] -> their records, each with its text as "prompt".
      applies: returns whether the named reward applies to the prompt. A reward sees only the
        images whose prompts it applies to.
    """

    def score(images: np.ndarray, ids: np.ndarray) -> NamedScores:
        records = lookup(ids)
        out = {}
        for name, reward in rewards.items():
            out[name] = np.full(len(images), np.nan, np.float32)
            rows = np.array([i for i, record in enumerate(records) if applies(name, record)], int)
            if rows.size:
                chosen = [records[i] for i in rows]
                texts = [record["prompt"] for record in chosen]
                scores, valid = guarded(name, reward, images[rows], texts, chosen)
                out[name][rows] = np.where(valid, scores, np.nan)
        return out

    return score


def submit(pool: Executor, work: Callable[..., Any], *batch: Any) -> Future[Any]:
    """Call `work` in a thread, which may wait for the device; the caller goes on dispatching."""
    return _track(pool.submit(work, *batch))


def callback(
    score: Score, names: Sequence[str], mesh: Mesh, rows: PartitionSpec
) -> Callable[[jax.Array, jax.Array], NamedScores]:
    """Wrap `score` for a call inside a jitted program: f(images, ids) -> NamedScores of jax arrays.

    Args:
      names: the rewards that `score` returns.
      mesh, rows: how the batch axis is laid out; each process scores its own shards.
    """

    def on_host(images: Any, ids: Any) -> NamedScores:
        outside = inside_program.set(True)
        try:
            return score(np.asarray(images), np.asarray(ids))
        finally:
            inside_program.reset(outside)

    def per_shard(images: jax.Array, ids: jax.Array) -> NamedScores:
        shapes = dict.fromkeys(names, jax.ShapeDtypeStruct(ids.shape, jnp.float32))
        return io_callback(on_host, shapes, images, ids, ordered=False)

    return jax.shard_map(
        per_shard, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False
    )
