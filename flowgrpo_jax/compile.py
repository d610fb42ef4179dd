r"""Compile a recipe for a TPU pod without the pod, and say whether it fits and what it costs.

    python -m flowgrpo_jax.compile --config geneval:fast --topology v5e:4x4 \
        [--config.mesh.fsdp=4] [--out report.json]

The programs of an epoch are compiled ahead of time for real chips, on any machine, by the compiler
that the pod would use (`pip install -e '.[tpu]'`): `score` is the training rewards in the graph,
`judge` those of the evaluation. Needs no weights: published models are known by name, others by the
configs in their directory. Prints for each program the memory of a chip against what it has, the
arithmetic, what it moves over HBM and the links, the least time that these take, the share of the
chip's peak in that time, and the operations that take longest.

With `config.model.text_cache` the cache is taken to be full, and no text encoder to be there. Left
out: rewards on the host, its other work, and a loss on data. Times are lower bounds: `program_time`
says what they count. Communication is taken to run beside everything else: it adds time only where
it takes longer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from flowgrpo_jax import rewards, sharding
from flowgrpo_jax.algorithms import Algorithm
from flowgrpo_jax.assembly import batch_plan, parts, rollout_settings, settings
from flowgrpo_jax.assembly.batch_plan import Plan
from flowgrpo_jax.assembly.run import make_programs
from flowgrpo_jax.command_line import cli
from flowgrpo_jax.costs.hardware import Chip
from flowgrpo_jax.costs.program_costs import (
    Program,
    Report,
    advice,
    chip_bytes,
    inspect,
    table,
    topology,
)
from flowgrpo_jax.costs.program_shapes import (
    array,
    conditionings,
    empty_update,
    frozen,
    laid_out,
    rollout,
    training_state,
)
from flowgrpo_jax.models import Model, text_rows
from flowgrpo_jax.scoring import graph
from flowgrpo_jax.scoring.differentiable import Judge
from flowgrpo_jax.storage import outputs
from flowgrpo_jax.types import Credit


def programs(config: ConfigDict, model: Model, mesh: Mesh, plan: Plan) -> tuple[list[Program], Any]:
    """Every program of a run, and what stays on the devices all the while."""
    everywhere, rows = sharding.replicated(mesh), NamedSharding(mesh, sharding.ROWS)
    weights = frozen(model, mesh)
    text = {part: weights.pop(part) for part in model.text_shapes}
    algorithm, optimiser = parts.make_algorithm(config), parts.make_optimiser(config)
    advantage = rollout_settings.make_advantage(config, algorithm)
    state = training_state(model, algorithm, advantage, optimiser, mesh)

    encoded, m = text_rows(plan.groups), plan.micro_batch
    micro = config.eval.micro_batch or m
    tokens = laid_out(model.token_shapes(encoded), everywhere)
    cond, empty, tested = conditionings(model, text, tokens, (plan.groups, 1, micro), mesh)
    setup = parts.make_setup(config, model, algorithm, sharding.row_shards(mesh))
    gradient, figures = empty_update(model, algorithm, setup, mesh)
    latent = model.latent_shape(config.model.height, config.model.width)
    drawn = rollout(setup, m, latent, mesh)
    one_each, scalar = array(rows, m), array(everywhere)
    keys = laid_out(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), micro)), rows)
    size = config.model.height, config.model.width, 3
    pictures = [(array(rows, n, *size, dtype=jnp.uint8), array(rows, n)) for n in (m, micro)]
    scoring, judging = score(config, mesh, (plan.groups, *pictures[0]), (micro, *pictures[1]))
    judge, judged = differentiated(config, model, algorithm, plan.groups, weights["vae"], scoring)
    given = (config, model, mesh, plan, setup, algorithm, optimiser)
    built = make_programs(*given, judge=judge)
    towers = {id(x): x for program in (*scoring, *judging) for x in jax.tree.leaves(program[1][0])}

    evaluating = (state.policy, weights, tested, empty, array(rows, micro), keys)
    sample = (state.policy, weights, cond, empty, state.key, 0, scalar, *[one_each] * 3)
    reference = state.policy if config.lora.rank else {}
    others = {name: state.copies.get(name, reference) for name in algorithm.reads}
    policy = (state.policy, others, weights["transformer"], cond, empty)
    terms = laid_out(
        jax.eval_shape(lambda key: algorithm.terms(setup, key), jax.random.key(0)), everywhere
    )
    a: Any = array(rows, m, dtype=jnp.float32)
    replay = (drawn, Credit(a, a if config.kl.name else None), terms, judged)
    batches = plan.updates * plan.micro_batches
    evaluated = -(-config.eval.images // micro)
    listed = [
        Program(
            "text", -(-plan.groups // encoded), model.encode_text, (text, tokens), repeated=True
        ),
        Program("sample", batches, built.sample, sample),
        *(Program("score", batches, *program) for program in scoring),
        Program("accumulate", batches, built.accumulate, (gradient, figures, *policy, *replay)),
        Program("apply", plan.updates, built.apply, (state, gradient)),
    ]
    if config.eval.every:
        listed.append(Program("evaluate", evaluated, built.generate, evaluating))
        listed += [Program("judge", evaluated, *program) for program in judging]
    # An epoch that is stopped never happened: its first state stays beside the newest.
    states = [state] * min(plan.updates, 2)
    stays = (weights, list(towers.values()), states, cond, empty, [drawn] * batches)
    if config.model.text_cache:  # taken to be filled ahead, so that no encoder is ever read
        return listed[1:], stays
    return listed, (text, *stays)


Scoring = list[tuple[Any, tuple[Any, ...]]]  # a program and its arguments; none without rewards


def score(
    config: ConfigDict, mesh: Mesh, *batches: tuple[int, Any, Any]
) -> tuple[Scoring, Scoring]:
    """The programs of the rewards in the graph: those of training and those of evaluation.

    Args:
      batches: (prompts, images, rows) of a micro-batch of training, and of evaluation.
    """
    everywhere = sharding.replicated(mesh)
    place = graph.place_once(lambda x: laid_out(x, everywhere))  # towers that are shared, once

    def program(names: tuple[str, ...], prompts: int, images: Any, rows: Any) -> Scoring:
        found = rewards.describe(names, config.reward.options.to_dict())
        if not found:
            return []
        scorer = graph.GraphRewards({name: x.reward for name, x in found.items()}, place)
        prepared = {
            name: {
                key: array(everywhere, prompts, *x.shape, dtype=x.dtype)
                for key, x in reward.inputs.items()
            }
            for name, reward in found.items()
        }
        return [(scorer.program, (scorer.weights, images, prepared, rows))]

    training, testing = (
        program(weights.names, *batch)
        for weights, batch in zip(parts.reward_weights(config), batches)
    )
    return training, testing


def differentiated(
    config: ConfigDict, model: Model, algorithm: Algorithm, prompts: int, vae: Any, scoring: Scoring
) -> tuple[Judge | None, Any]:
    """Return the rewards that an update differentiates, and the shapes of their inputs."""
    if not algorithm.reward_gradient:
        return None, ()
    names, ((_, (weights, _, prepared, _)),) = parts.reward_weights(config)[0].trained, scoring
    found = rewards.describe(names, config.reward.options.to_dict())
    number = array(jax.tree.leaves(vae)[0].sharding, prompts, dtype=jnp.float32)
    text, towers = ({name: x[name] for name in found} for x in (prepared, weights))
    inputs = {"vae": vae, "rewards": towers, "weights": dict.fromkeys(found, number)}
    inputs["texts"] = [text for _ in algorithm.texts]
    return parts.make_judge(model, algorithm, {n: x.reward for n, x in found.items()}), inputs


def undescribed(config: ConfigDict) -> list[str]:
    """The rewards of training and evaluation that no program here is for."""
    names = {name for weights in parts.reward_weights(config) for name in weights.names}
    return sorted(names - set(rewards.describe(names, config.reward.options.to_dict())))


def inspect_timed(program: Program, stays: Any, chip: Chip, chips: int) -> Report:
    """`inspect` a program, and say how long that took: some take many minutes."""
    began = time.monotonic()
    report = inspect(program, stays, chip, chips)
    took = time.monotonic() - began
    print(f"{program.name} was compiled in {took:.0f} s", file=sys.stderr, flush=True)
    return report


def main(_: list[str]) -> None:
    config = cli.config()
    settings.check(config)
    settings.require(
        not config.train.tape,
        "train.tape=True: what a rollout keeps for its gradient is known once it is compiled, and"
        " is not counted here; set it to False",
    )
    if flags.FLAGS.out:
        outputs.check_file(flags.FLAGS.out, "--out")
    chip, devices = topology(flags.FLAGS.topology)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    plan = batch_plan.make_plan(config, sharding.row_shards(mesh))
    model = parts.describe_model(config, mesh)
    model = parts.drop_frozen(model, parts.make_algorithm(config))
    layout = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    print(f"{config.name}: {config.model.path} on {flags.FLAGS.topology}, {layout}\n{plan}")
    listed, stays = programs(config, model, mesh, plan)
    names = [program.name for program in listed]
    wanted = flags.FLAGS.programs or names
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"--programs: {', '.join(unknown)} is not one of {', '.join(names)}")
    reports = [inspect_timed(p, stays, chip, mesh.size) for p in listed if p.name in wanted]
    resident = chip_bytes(stays)
    verdict = advice(
        reports, resident, chip, fsdp=sharding.weight_shards(mesh), remat=config.model.remat
    )
    part = f" (of {', '.join(wanted)} alone)" if len(reports) < len(listed) else ""
    print(table(reports, resident, chip, plan.images), verdict + part, sep="\n")
    if uncounted := undescribed(config):
        print(f"not counted: {', '.join(uncounted)} (on the host, or not in its file's DESCRIBED)")
    if flags.FLAGS.out:
        result = {
            "config": config.to_dict(),
            "topology": flags.FLAGS.topology,
            "jax": jax.__version__,
            "resident": resident,
            "verdict": verdict,
            "programs": [r._asdict() for r in reports],
        }
        Path(flags.FLAGS.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used
    cli.define_flags(config=True)
    flags.DEFINE_list(
        "programs", None, "Which programs to compile, such as sample,accumulate; all without it."
    )
    flags.DEFINE_string(
        "topology", None, "The chips to compile for, such as v5e:4x4.", required=True
    )
    flags.DEFINE_string("out", None, "The JSON file to write the report to.")
    cli.run(main)
