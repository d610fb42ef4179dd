"""Every knob, with one sentence each. Recipes start from here and change a few lines.

Any knob that a recipe lists can be set on the command line: `--config.train.learning_rate=1e-4`.
Recipes of the paper's tasks have variants, chosen as `--config geneval:fast`: `variant` below.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    # Name of the run in logs, and of its work directory below runs/.
    c.name = "base"
    # Root of every random choice of the run.
    c.seed = 0
    # Epochs to train, counted from 0 and across resumes.
    c.epochs = 1_000

    c.model = ConfigDict()
    # Directory, hub id, shapes, signs.
    c.model.path = "stabilityai/stable-diffusion-3.5-medium"
    # Type of the frozen transformer and text encoders, and of what they compute; or float32.
    c.model.dtype = "bfloat16"
    # Type in which the frozen kernels of the transformer's blocks are stored: int8 takes half the
    # memory of bfloat16 (pip install 'flowgrpo_jax[int8]'); empty: the same as model.dtype. The
    # computation is in model.dtype in both cases.
    c.model.base_dtype = ""
    # Image size in pixels.
    c.model.height, c.model.width = 512, 512
    # The kind of model, a name in models.TABLE or package.module:name of your own;
    # empty: what the model's own model_index.json says.
    c.model.family = ""
    # Options of that kind of model. SD3's: t5 loads the largest text encoder, without which zeros
    # stand for its states; t5_length is the T5 tokens of a prompt, where 0 means as many as its
    # tokenizer says, at most 128.
    c.model.options = ConfigDict({"t5": True, "t5_length": 0})
    # Directory that keeps encoded prompts (1.7 MB each); empty: none.
    c.model.text_cache = ""
    # Kernel of the transformer's attention: auto, or one of xla (plain), cudnn (NVIDIA's GPUs in
    # bfloat16), joint and flash (TPUs)
    c.model.attention = "auto"
    # Type to which the transformer's linears round what they multiply; empty: model.dtype. It is
    # for models in float32: bfloat16, or auto, bfloat16 on CPUs that have instructions for it.
    c.model.product_dtype = ""
    # Recompute activations in the backward pass, block by block.
    c.model.remat = True
    # Images that a device decodes at once; 0: as many as have 512 x 512 pixels together, or one.
    c.model.decode_batch = 0

    # How the devices are laid out; -1: what the other two leave.
    c.mesh = ConfigDict()
    # Copies of the weights, each with its share of the batch.
    c.mesh.data = -1
    # Parts of the frozen weights, each with its share of the batch.
    c.mesh.fsdp = 1
    # Parts of every linear, which work on the same images.
    c.mesh.tensor = 1
    # Devices that the CPU counts as where there is no accelerator, each with its copy of the
    # weights; 0: one a core, as far as they divide the micro-batches.
    c.cpu_devices = 1

    c.lora = ConfigDict()
    # Rank of the adapter; 0: none, all of the transformer's weights are trained.
    c.lora.rank = 32
    # The adapter's scale is alpha / rank.
    c.lora.alpha = 64.0
    # Linears with an adapter, by the end of their dotted name; empty: those that the kind of model
    # names, SD3's joint attention.
    c.lora.targets = ()

    c.prompts = ConfigDict()
    # Source of training prompts: .txt, .jsonl, geneval:train, ocr:train, ...
    c.prompts.train = ""
    # Source of evaluation prompts; generated ones are not trained on.
    c.prompts.test = ""
    # Relative frequency of each tag's prompts; empty: all prompts are equally frequent.
    c.prompts.tag_weights = ConfigDict(allow_dotted_keys=True)
    # Several sources at once, in place of train and test: {task: {"train": source, "test": source,
    # "weight": frequency, "rewards": names or all}}.
    c.prompts.tasks = ConfigDict()
    # Give each epoch the prompts of one task, in turn by their names, in place of a mixture.
    c.prompts.alternate = False

    c.sample = ConfigDict()
    # Prompts an epoch (P)
    c.sample.groups = 48
    # Images of each prompt (G)
    c.sample.group_size = 24
    # Images handled at once (M); 0: derived, up to 4 of 512 px a device.
    c.sample.micro_batch = 0
    # Transitions of a rollout (T)
    c.sample.steps = 10
    # Classifier-free guidance; up to 1 means none, a single forward a step.
    c.sample.guidance_scale = 4.5
    # Transition kernel: flow_sde, dance, flash, cps, precise, precise_dance, precise_flash, or one
    # of your own.
    c.sample.kernel = "flow_sde"
    # Strength of the SDE's noise, unitless.
    c.sample.noise_level = 0.7
    # Stochastic steps, the rest is ODE; 0: all but the last step.
    c.sample.window = 0
    # Steps among which the window lies, the second not included; (0, 0): fixed at 0.
    c.sample.window_range = (0, 0)
    # Where in the range a window lies: random, frozen, progressive, decay or exp_decay; each and
    # distinct give an epoch's windows different places (flowgrpo_jax/sampling/windows.py).
    c.sample.window_schedule = "random"
    # Keyword arguments of the schedule, such as {"every": 25} for "progressive".
    c.sample.window_options = ConfigDict()
    # Solver of the steps without noise: euler, dpmpp_2m, or one of your own.
    c.sample.solver = "euler"
    # Share of the steps after the window that are taken, evenly spaced; 1: all of them.
    c.sample.tail = 1.0
    # Windows an epoch, each of an equal part of the groups.
    c.sample.windows = 1
    # Give these parts the same prompts, and not prompts of their own.
    c.sample.same_prompts = False
    # Take every n-th step after the window: for each n, a part of the groups with the same prompts.
    c.sample.strides = (1,)
    # Images of a group that start from the same noise, and share all up to the first split; 0: all.
    c.sample.branches = 1
    # Steps at which each shared path splits into equal branches; (): once, at the window's start.
    c.sample.splits = ()
    # Factor of the noise at a split; the log-prob does not have it.
    c.sample.split_noise = 1.0
    # Share s of an image's own noise in its first noise, sqrt(1 - s^2) shared + s own; 0: no shared
    # noise.
    c.sample.neighbor_noise = 0.0
    # Form of the log-prob: gaussian, or squared_error (upstream's for cps)
    c.sample.density = "gaussian"
    # Reduction of log-prob and KL over latent dimensions: mean or sum.
    c.sample.reduction = "mean"

    c.reward = ConfigDict()
    # {name: weight}; weight 0 is logged and never trained on.
    c.reward.weights = ConfigDict(allow_dotted_keys=True)
    # {name: {option: value}}; a recipe lists all that its rewards take.
    c.reward.options = ConfigDict()
    # How the host scores single images: overlap (threads between programs) or callback (inside the
    # program).
    c.reward.host_call = "overlap"
    # Threads that call the host's rewards, but for those of a callback.
    c.reward.threads = 1
    # Seconds that a call of a reward may take, for a micro-batch, a group or an epoch; 0: no limit.
    c.reward.timeout = 1800.0
    # Share of an epoch's images whose reward may fail before the run stops.
    c.reward.max_failed = 0.5

    # How much better an image is than expected: one of flowgrpo_jax/advantages, which are
    # "group", "global", "none", "batch", "quasi_norm", "best_of_n", "gdpo", "per_prompt" and
    # "tree", or "package.module:make" of your own.
    c.advantage = ConfigDict()
    # Name of the advantage.
    c.advantage.name = "group"
    # Its keyword arguments, such as {"buffer_size": 32} for "per_prompt".
    c.advantage.options = ConfigDict()
    # Advantages are cut to [-clip, clip].
    c.advantage.clip = 5.0
    # What becomes of an advantage A: none, or exp for -exp(-A), DDRL's.
    c.advantage.transform = "none"
    # Multiply the advantage of good images by how unlike the others of their prompt they are, as in
    # GARDO, by these features: latents, pixels, or a function of your own from pixels to features,
    # package.module:function; empty: no.
    c.advantage.diversity = ""

    # By how much each image's KL counts, beside the algorithm's own beta: constant, adaptive or
    # uncertain (flowgrpo_jax/regularisation/kl_control.py), or one of your own.
    c.kl = ConfigDict()
    # Name of the weighting; empty: none, every image's KL counts alike.
    c.kl.name = ""
    # Its keyword arguments, such as {"target": 1e-3} for "adaptive".
    c.kl.options = ConfigDict()
    # With a weighting: the policy becomes its own reference after an epoch whose KL is above this;
    # 0: never.
    c.kl.reset_above = 0.0
    # With a weighting: and after so many epochs with the same reference; 0: never.
    c.kl.reset_every = 0

    # How images and advantages become a gradient: one of flowgrpo_jax/algorithms, or
    # "package.module:make" of your own. The options are its keyword arguments; its file says
    # what each one means. A recipe for another algorithm replaces the options as a whole.
    c.algorithm = ConfigDict()
    # Name of the algorithm.
    c.algorithm.name = "grpo"
    # Its keyword arguments.
    c.algorithm.options = ConfigDict()
    # How far a ratio may move from 1. It is a mean over latent dimensions (sample.reduction).
    c.algorithm.options.clip_range = 1e-4
    # Weight of the KL to the policy before training; 0 spares its forward pass.
    c.algorithm.options.kl_beta = 0.0
    # How the KL weighs steps: exact, or no_dt as upstream, which wants a beta ten times larger, or
    # velocity, the squared distance of the velocities.
    c.algorithm.options.kl_weighting = "exact"
    # How many of the window's steps an epoch trains; 0 means all.
    c.algorithm.options.steps = 0
    # Which of them: random (drawn each epoch) or first.
    c.algorithm.options.step_choice = "random"
    # Weight of a step in the loss: none, tempflow, flash or guard (flowgrpo_jax/algorithms/
    # step_weights.py).
    c.algorithm.options.step_weight = "none"
    # Trust region: clip, guard or dppo (flowgrpo_jax/algorithms/trust_regions.py)
    c.algorithm.options.trust_region = "clip"
    # KL of a transition from which on dppo drops it.
    c.algorithm.options.kl_threshold = 1e-5
    # Subtract the expected score from the gradient.
    c.algorithm.options.centering = False
    # Optimiser steps after which the policy becomes its own reference; 0: never.
    c.algorithm.options.reset_every = 0

    # A loss on data beside the algorithm's, that of pretraining: DDRL's, Pinterest's.
    c.data = ConfigDict()
    # Its pictures: base (the base model's own samples for the epoch's prompts), shapes, signs (what
    # these models were pretrained on), or a folder with NAME.png and NAME.txt or metadata.jsonl;
    # empty: none.
    c.data.source = ""
    # Weight beside the algorithm's loss; 0: none.
    c.data.weight = 0.01
    # Pictures an update.
    c.data.images = 64
    # Epochs from one with this loss to the next.
    c.data.every = 1
    # Take an optimiser step of its own after the epoch's updates, and not a part in each of them.
    c.data.own_step = False

    c.train = ConfigDict()
    # Updates an epoch, each on its own groups: an optimiser step, or with step_each_term several.
    c.train.updates_per_epoch = 2
    # Take an optimiser step after each term that an algorithm trains (GRPO: each step of the
    # window), and not after all of them.
    c.train.step_each_term = False
    # Keep the forward passes of the window for its gradient: the update then takes two thirds of
    # its time and the memory of the window's activations. For an epoch with one update
    # (flowgrpo_jax/sampling/taped.py).
    c.train.tape = False
    # Learning rate of AdamW.
    c.train.learning_rate = 3e-4
    # Optimiser steps of linear warm-up.
    c.train.warmup_steps = 0
    # Steps after which the rate falls as 1 / sqrt(step); 0: constant.
    c.train.decay_steps = 0
    # Decay rates of AdamW's two moments, and epsilon.
    c.train.b1, c.train.b2, c.train.eps = 0.9, 0.999, 1e-8
    # Weight decay of AdamW.
    c.train.weight_decay = 1e-4
    # Clip of the global gradient norm; inf: none.
    c.train.max_grad_norm = 1.0
    # Epochs in a row without a finite gradient before the run stops.
    c.train.max_skipped = 5
    # Decay of the evaluated weights per optimiser step; upstream's 0.9 acts in 1 of 8 steps, then
    # twice (on 32 devices), which is 0.9 ** (2 / 8) for each.
    c.train.ema_decay = 0.974

    c.eval = ConfigDict()
    # Epochs between evaluations, the first before training; 0: never.
    c.eval.every = 20
    # Images of an evaluation, spread evenly over the tags of the test prompts.
    c.eval.images = 288
    # Images handled at once; 0: as many as in a rollout.
    c.eval.micro_batch = 0
    # Steps of the ODE that draws the pictures.
    c.eval.steps = 40
    # Solver of these steps: euler, dpmpp_2m, or one of your own.
    c.eval.solver = "euler"
    # Guidance in evaluation; up to 1 means none.
    c.eval.guidance_scale = 4.5
    # Names of rewards to measure; empty: the training rewards.
    c.eval.rewards = ()
    # Seed of the evaluation's noise, the same every time.
    c.eval.seed = 1234
    # Images in the sample grid.
    c.eval.grid = 36

    c.checkpoint = ConfigDict()
    # Epochs between checkpoints; the last epoch always gets one.
    c.checkpoint.every = 20
    # Newest checkpoints kept; 0: all of them.
    c.checkpoint.keep = 5
    # Evaluated reward whose best checkpoint is kept, in best/; the best is the lowest where its
    # weight is negative; empty: none.
    c.checkpoint.best = ""

    # What the evaluated pictures are watched for (docs/report.md)
    c.monitor = ConfigDict()
    # At an alarm: note (a warning and a mark on the page), stop (the last state without one is in
    # good/) or raise_kl (algorithm.options.kl_beta becomes twice as large).
    c.monitor.on_alarm = "note"
    # What raise_kl makes of a kl_beta of 0.
    c.monitor.kl_beta = 0.04
    # True pictures on which the flow-matching loss is watched: a folder of NAME.png with captions
    # NAME.txt, or a function package.module:name; empty: none.
    c.monitor.pictures = ""
    # Measure how far the velocity is from that of the base model, by noise level.
    c.monitor.move = True

    c.log = ConfigDict()
    # Write TensorBoard events to the work directory.
    c.log.tensorboard = True
    # Log to Weights & Biases, if installed.
    c.log.wandb = False
    return c.lock()
