"""Tunix's own sampler or GRPO learner on the shapes given as one JSON argument; prints one JSON line.

Runs in an environment of its own (see bench/peers/environment.py). "mode" is "rollout" or "step".
"""

import json
import os
import resource
import sys
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
STDOUT = os.dup(1)
os.dup2(2, 1)  # libraries write to stdout too

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

WARM_UP = 2


class Numbers:
    """A tokenizer whose text is token ids; it has no end token that the model could sample."""

    def __init__(self, vocab):
        self.vocab = vocab

    def encode(self, text, **kwargs):
        return [int(word) for word in text.split()]

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 0

    def pad_id(self):
        return 0

    def eos_id(self):
        return self.vocab + 1


def build_model(shape, mesh):
    config = qwen3.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab"],
        embed_dim=shape["hidden"],
        hidden_dim=3 * shape["hidden"],
        num_heads=shape["heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    config.dtype = config.param_dtype = jnp.dtype("float32")
    with mesh:
        graph, state = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
        leaves, tree = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        drawn = [x if x.ndim == 1 else 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = [jax.device_put(x, whole) for x in drawn]
        return nnx.merge(graph, jax.tree.unflatten(tree, placed))


def end_tokens(shape):
    """Return the vocabulary's last entries, as many as make lengths geometric with the mean asked for."""
    mean = shape.get("mean_length", 0)
    count = max(1, round(shape["vocab"] / mean)) if mean else 0
    return list(range(shape["vocab"] - count, shape["vocab"])) or None


def random_prompts(shape, seed):
    rows = np.random.default_rng(seed).integers(3, shape["vocab"] // 2, (shape["prompts"], shape["prompt_length"]))
    return [" ".join(map(str, row)) for row in rows]


def run_sampler(shape, mesh):
    """Return the useful tokens per second of every timed call."""
    model = build_model(shape, mesh)
    size = shape["prompt_length"] + shape["new_tokens"]
    cache = sampler.CacheConfig(
        cache_size=size, num_layers=shape["layers"], num_kv_heads=shape["kv_heads"], head_dim=shape["head_dim"]
    )
    run = sampler.Sampler(model, Numbers(shape["vocab"]), cache)
    prompts = [prompt for prompt in random_prompts(shape, 0) for _ in range(shape["generations"])]
    rates = []
    for number in range(shape["repeats"] + 1):
        started = time.perf_counter()
        out = run(
            prompts,
            max_generation_steps=shape["new_tokens"],
            max_prompt_length=shape["prompt_length"],
            temperature=1.0,
            top_p=1.0,
            seed=number,
            eos_tokens=end_tokens(shape),
            echo=False,
        )
        rates.append(sum(len(row) for row in out.tokens) / (time.perf_counter() - started))
    return {"rates": rates[1:]}


def reward(prompts, completions, **kwargs):
    return [sum(map(int, text.split())) % 17 / 17.0 for text in completions]


def run_learner(shape, mesh):
    """Return the seconds of every global step after the warm-up."""
    batch = shape["prompts"]
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(3e-6, b1=0.9, b2=0.99)),
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=batch,
        train_micro_batch_size=batch,
        rollout_micro_batch_size=batch,
        compute_logps_micro_batch_size=batch,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=shape["new_tokens"],
        max_prompt_length=shape["prompt_length"],
        kv_cache_size=shape["prompt_length"] + shape["new_tokens"],
        temperature=1.0,
        top_p=1.0,
    )
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=build_model(shape, mesh),
        reference=None,
        tokenizer=Numbers(shape["vocab"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={roles.ACTOR: mesh, roles.REFERENCE: mesh, roles.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=training,
            rollout_config=rollout,
        ),
    )
    algorithm = grpo_learner.GRPOConfig(num_generations=shape["generations"], num_iterations=1, beta=0.0, epsilon=0.2)
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward)
    seconds, step = [], learner._run_global_step

    def timed(*args, **kwargs):
        started = time.perf_counter()
        result = step(*args, **kwargs)
        jax.block_until_ready(jax.tree.leaves(nnx.state(cluster.actor_trainer.model)))
        seconds.append(time.perf_counter() - started)
        return result

    learner._run_global_step = timed
    steps = range(shape["repeats"] + WARM_UP)
    learner.train({"prompts": np.array(random_prompts(shape, i)), "answer": np.array(["0"] * batch)} for i in steps)
    return {"seconds": seconds[WARM_UP:]}


def main():
    shape = json.loads(sys.argv[1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    result = {"rollout": run_sampler, "step": run_learner}[shape["mode"]](shape, mesh)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    os.write(STDOUT, (json.dumps(result | {"peak_mib": peak, "jax": jax.__version__}) + "\n").encode())


if __name__ == "__main__":
    main()
