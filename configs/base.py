"""Every knob, with one sentence each. Recipes start from here and change a few lines.

Any knob that a recipe lists can be set on the command line: `--config.train.learning_rate=1e-4`.
Recipes of the paper's tasks have variants, chosen as `--config configs/geneval.py:fast`: `variant`
below.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"  # name of the run in logs, and of its work directory below runs/
    c.seed = 0  # root of every random choice of the run
    c.epochs = 1_000  # epochs to train, counted from 0 and across resumes

    c.model = ConfigDict()
    c.model.path = "stabilityai/stable-diffusion-3.5-medium"  # directory, hub id, shapes, signs
    c.model.dtype = "bfloat16"  # type of the frozen transformer and text encoders, and of what
    # they compute; or float32
    c.model.height, c.model.width = 512, 512  # image size in pixels
    c.model.t5 = True  # load the largest text encoder; without it zeros stand for its states
    c.model.t5_length = 128  # T5 tokens of a prompt
    c.model.text_cache = ""  # directory that keeps encoded prompts (1.7 MB each); empty: none
    c.model.attention = "xla"  # kernel of the transformer's attention: xla, or cudnn (NVIDIA's
    # GPUs, bfloat16)
    c.model.remat = True  # recompute activations in the backward pass, block by block

    c.mesh = ConfigDict()  # how the devices are laid out; -1: what the other two leave
    c.mesh.data = -1  # copies of the weights, each with its share of the batch
    c.mesh.fsdp = 1  # parts of the frozen weights, each with its share of the batch
    c.mesh.tensor = 1  # parts of every linear, which work on the same images
    c.cpu_devices = 1  # devices that the CPU counts as where there is no accelerator, each with
    # its copy of the weights; 0: one a core, as far as they divide the micro-batches

    c.lora = ConfigDict()
    c.lora.rank = 32  # rank of the adapter; 0: none, all of the transformer's weights are trained
    c.lora.alpha = 64.0  # the adapter's scale is alpha / rank
    c.lora.targets = (  # linears with an adapter, by the end of their dotted name
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    c.prompts = ConfigDict()
    c.prompts.train = ""  # source of training prompts: .txt, .jsonl, geneval:train, ocr:train, ...
    c.prompts.test = ""  # source of evaluation prompts; generated ones are not trained on
    c.prompts.tag_weights = ConfigDict(allow_dotted_keys=True)  # relative frequency of each tag's
    # prompts; empty: all prompts are equally frequent
    c.prompts.tasks = ConfigDict()  # several sources at once, in place of train and test:
    # {task: {"train": source, "test": source, "weight": frequency, "rewards": names or all}}

    c.sample = ConfigDict()
    c.sample.groups = 48  # prompts an epoch (P)
    c.sample.group_size = 24  # images of each prompt (G)
    c.sample.micro_batch = 0  # images handled at once (M); 0: derived, up to 4 of 512 px a device
    c.sample.steps = 10  # transitions of a rollout (T)
    c.sample.guidance_scale = 4.5  # classifier-free guidance; up to 1 means none, a single forward
    # a step
    c.sample.kernel = "flow_sde"  # transition kernel: flow_sde or cps
    c.sample.noise_level = 0.7  # strength of the SDE's noise, unitless
    c.sample.window = 0  # stochastic steps, the rest is ODE; 0: all but the last step
    c.sample.window_range = (0, 0)  # steps among which the window's place is drawn each epoch;
    # (0, 0): fixed at 0
    c.sample.same_noise = False  # start all images of a group from the same noise
    c.sample.density = "gaussian"  # form of the log-prob: gaussian, or squared_error (upstream's
    # for cps)
    c.sample.reduction = "mean"  # reduction of log-prob and KL over latent dimensions: mean or sum

    c.reward = ConfigDict()
    c.reward.weights = ConfigDict()  # {name: weight}; weight 0 is logged and never trained on
    c.reward.combine = "rewards"  # rewards: weighted sum; advantages: each normalised by itself
    # first (GDPO)
    c.reward.options = ConfigDict()  # {name: {option: value}}; a recipe lists all that its rewards
    # take
    c.reward.host_call = "overlap"  # overlap (threads between programs) or callback (inside the
    # program)
    c.reward.threads = 1  # threads that score images in overlap mode
    c.reward.timeout = 1800.0  # seconds that a reward may take for a micro-batch; 0: no limit
    c.reward.max_failed = 0.5  # share of an epoch's images whose reward may fail before the run
    # stops

    c.train = ConfigDict()
    c.train.updates_per_epoch = 2  # optimiser steps an epoch, each on its own groups
    c.train.learning_rate = 3e-4  # learning rate of AdamW
    c.train.warmup_steps = 0  # optimiser steps of linear warm-up
    c.train.decay_steps = 0  # steps after which the rate falls as 1 / sqrt(step); 0: constant
    c.train.b1, c.train.b2, c.train.eps = 0.9, 0.999, 1e-8  # decay rates of AdamW's two moments,
    # and epsilon
    c.train.weight_decay = 1e-4  # weight decay of AdamW
    c.train.max_grad_norm = 1.0  # clip of the global gradient norm; inf: none
    c.train.max_skipped = 5  # epochs in a row without a finite gradient before the run stops
    c.train.loss = "clip"  # the policy loss, by its name in grpo.LOSSES
    c.train.clip_range = 1e-4  # clip range of the ratio, which is a mean over latent
    # dimensions (see sample.reduction)
    c.train.advantage_std = "group"  # what advantages are divided by: the std of the group, of
    # all images (global), or none
    c.train.advantage_clip = 5.0  # largest advantage; inf: no limit
    c.train.kl_beta = 0.0  # weight of the KL to the reference policy; 0: no reference forward
    c.train.kl_weighting = "exact"  # weights of the KL's steps: exact, or no_dt (upstream's, which
    # wants a beta ten times larger)
    c.train.steps = 0  # how many of the window's steps to train each epoch; 0: all
    c.train.step_choice = "random"  # which steps these are: random (drawn each epoch) or first
    c.train.ema_decay = 0.974  # decay of the evaluated weights per optimiser step; upstream's 0.9
    # acts in 1 of 8 steps, then twice (on 32 devices), which is 0.9 ** (2 / 8) for each

    c.eval = ConfigDict()
    c.eval.every = 20  # epochs between evaluations, the first before training; 0: never
    c.eval.images = 288  # images of an evaluation, spread evenly over the tags of the test prompts
    c.eval.micro_batch = 0  # images handled at once; 0: as many as in a rollout
    c.eval.steps = 40  # steps of the ODE that draws the pictures
    c.eval.guidance_scale = 4.5  # guidance in evaluation; up to 1 means none
    c.eval.rewards = ()  # names of rewards to measure; empty: the training rewards
    c.eval.seed = 1234  # seed of the evaluation's noise, the same every time
    c.eval.grid = 36  # images in the sample grid

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # epochs between checkpoints; the last epoch always gets one
    c.checkpoint.keep = 5  # newest checkpoints kept; 0: all of them
    c.checkpoint.best = ""  # evaluated reward whose best checkpoint is kept, in best/; empty: none

    c.log = ConfigDict()
    c.log.tensorboard = True  # write TensorBoard events to the work directory
    c.log.wandb = False  # log to Weights & Biases, if installed
    return c.lock()


def fast(c: ConfigDict) -> None:
    """Flow-GRPO-Fast without guidance: 3 noisy steps of the first 5, one forward a step.

    Upstream's `geneval_sd3_fast_nocfg`. About a fifth of the full recipe's arithmetic. Without
    a KL term watch the rewards that are not trained on.
    """
    c.sample.kernel, c.sample.noise_level = "cps", 0.8
    c.sample.window, c.sample.window_range = 3, (0, 5)
    c.sample.guidance_scale = c.eval.guidance_scale = 1.0
    c.train.clip_range = 1e-5
    c.train.kl_beta = 0.0


def single_gpu(c: ConfigDict) -> None:
    """`fast` with a small evaluation; the epochs are the same, and take longer."""
    fast(c)
    c.eval.images, c.eval.every = 288, 20


VARIANTS = {"full": lambda c: None, "fast": fast, "single_gpu": single_gpu}


def variant(c: ConfigDict, name: str) -> ConfigDict:
    """The variant of a recipe that is in its full form. Raises ValueError for an unknown one."""
    if name not in VARIANTS:
        raise ValueError(f"{c.name}:{name}: choose a variant from {', '.join(VARIANTS)}")
    VARIANTS[name](c)
    c.name = c.name if name == "full" else f"{c.name}-{name}"
    return c
