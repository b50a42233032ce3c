"""Import, use, further training and export of diffusers' weights; and every invalid folder."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import references
import safetensors.numpy
from family import configs_of_networks, network_json
from hypothesis import given, settings
from references import FIXTURES

import ddpm_jax
from ddpm_jax import checks, cli, configs
from ddpm_jax.core import unet
from ddpm_jax.errors import UserError
from ddpm_jax.files import checkpoint, run_files
from ddpm_jax.runs import interop, networks, schedulers, states

TENSORS = f"unet/{interop.TENSORS}"


def run(mode, *arguments):
    assert cli.run(["main.py", f"--mode={mode}", *arguments]) == 0


def edit(path, **changes):
    """Changes fields of a JSON file; "away" takes one away."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if v != "away"}))


@pytest.fixture
def weights(tmp_path):
    """A copy of the fixtures' folder."""
    return pathlib.Path(shutil.copytree(FIXTURES, tmp_path / "weights"))


def test_gradient_of_each_tensor():
    """references.py asserts them as one vector."""
    theirs, ours = references.expected_gradients(), references.network_gradients()
    references.assert_same_gradients(ours, theirs)


@pytest.mark.usefixtures("no_report")
def test_import_sample_train_and_export(tmp_path, weights):
    """The run works like any other; raw and EMA weights are exported without change of a bit."""
    workdir, out = f"--workdir={tmp_path / 'run'}", tmp_path / "out"
    run("import", workdir, f"--weights={weights}")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json"]
    run("export", workdir, f"--weights={out}", "--noconfig.sample.use_ema")
    before, after = (safetensors.numpy.load_file(f / TENSORS) for f in (weights, out))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        theirs, ours = (json.loads((folder / name).read_text()) for folder in (weights, out))
        assert {name: theirs[name] for name in ours} == ours  # what it is silent about is default

    few = ["--config.sample.num_samples=4", "--config.sample.batch_size=4"]
    run("sample", workdir, *few)
    images = np.load(tmp_path / "run/samples/sample_000000_n4_seed0.npz")["images"]
    assert images.shape == (4, 8, 8, 3)
    with pytest.raises(UserError, match=r"data\.name=''"):
        run("train", workdir)
    digits = ["--config.data.name=digits", "--config.data.eval_split=train[:20]"]
    digits += ["--config.train.batch_size=8", "--config.train.num_steps=2", "--config.seed=3"]
    run("train", workdir, *digits, *few)
    run("export", workdir, f"--weights={tmp_path / 'trained'}")
    trained = safetensors.numpy.load_file(tmp_path / "trained" / TENSORS)
    moved = [np.abs(trained[name] - before[name]).max() for name in before]
    assert 0 < max(moved) < 1e-6  # one update at 1/5000 of the learning rate, and 1e-4 of it
    with pytest.raises(UserError, match="seed 3 -> 4"):  # now the data count
        run("train", workdir, "--config.seed=4")


@pytest.mark.parametrize("name", ["cifar10", "celebahq256"])
def test_the_published_networks_are_the_paper_s(name):
    """The relevant fields of google/ddpm-cifar10-32 and -celebahq-256."""
    config = configs.named_config(name)
    cifar = name == "cifar10"
    fields = {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256] if cifar else [128, 128, 256, 256, 512, 512],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D"] * (4 if cifar else 6),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32 if cifar else 256,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D"] * (4 if cifar else 6),
    }
    fields["down_block_types"][1 if cifar else 4] = "AttnDownBlock2D"
    fields["up_block_types"][2 if cifar else 1] = "AttnUpBlock2D"
    scheduler = {"_class_name": "DDPMScheduler", **PUBLISHED}
    scheduler["variance_type"] = "fixed_large" if cifar else "fixed_small"
    found = networks.network_fields(fields, "f") | schedulers.read_scheduler(scheduler, "f")
    expected = configs.flatten(config)
    assert found == {name: expected[name] for name in found}
    assert len(found) == 30


def test_old_names_flat_folder_and_half_precision(tmp_path, weights):
    """As the published weights are, and as smaller copies of weights are."""
    flat = tmp_path / "flat"
    shutil.copytree(weights / "unet", flat)
    shutil.copy(weights / "scheduler" / "scheduler_config.json", flat)
    tensors = safetensors.numpy.load_file(flat / interop.TENSORS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = array.astype(np.float16)
    assert any(".query." in name for name in renamed)
    safetensors.numpy.save_file(renamed, flat / interop.TENSORS)
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={flat}")
    run("export", f"--workdir={tmp_path / 'run'}", f"--weights={tmp_path / 'out'}")
    out = safetensors.numpy.load_file(tmp_path / "out" / TENSORS)
    for name, array in tensors.items():
        np.testing.assert_array_equal(out[name], np.float32(np.float16(array)))


def test_cosines_first(weights):
    """The same network with the halves of its time embedding the other way round."""
    config, path = references.fixture_config(), weights / TENSORS
    tensors = safetensors.numpy.load_file(path)
    name = "time_embedding.linear_1.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:, [4, 5, 6, 7, 0, 1, 2, 3]])
    before = interop.read_params(path, config)
    safetensors.numpy.save_file(tensors, path)
    after = interop.read_params(path, config, flip_sin_to_cos=True)
    np.testing.assert_array_equal(before["temb1"]["kernel"], after["temb1"]["kernel"])


@pytest.mark.parametrize("name", ["linear", "linear_rescaled", "cosine", "quadratic", "sigmoid"])
def test_schedules_survive(name):
    config = configs.default_config()
    config.diffusion.update(schedule=name, num_timesteps=100, variance="fixed_small")
    scheduler = json.loads(json.dumps(schedulers.write_scheduler(config)))
    fields = schedulers.read_scheduler(scheduler, "f")
    again = configs.default_config()
    again.update_from_flattened_dict(fields)
    betas = [references.configs.make_schedule(c).betas for c in (config, again)]
    np.testing.assert_allclose(*betas, rtol=1e-6)
    assert (again.diffusion.variance, again.diffusion.clip_x0) == ("fixed_small", True)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_variance_and_clipping_survive(config, variance, clip):
    config.diffusion.update(variance=variance, clip_x0=clip)
    fields = schedulers.read_scheduler(schedulers.write_scheduler(config), "f")
    assert (fields["diffusion.variance"], fields["diffusion.clip_x0"]) == (variance, clip)


def test_a_scheduler_that_says_nothing():
    """DDPMScheduler's own defaults; and its other name of β̃, whose logarithm it takes first."""
    expected = {
        "diffusion.schedule": "linear",
        "diffusion.num_timesteps": 1000,
        "diffusion.beta_start": 1e-4,
        "diffusion.beta_end": 0.02,
        "diffusion.zero_terminal_snr": False,
        "diffusion.prediction": "eps",
        "diffusion.variance": "fixed_small",
        "diffusion.clip_x0": True,
        "sample.spacing": "leading",
    }
    for more in ({}, {"variance_type": "fixed_small_log"}):
        assert schedulers.read_scheduler({"_class_name": "DDPMScheduler", **more}, "f") == expected


def test_a_network_survives(config):
    """Not square, with attention and dropout; heights are the first of each pair in both."""
    config.data.update(image_size=(16, 24), channels=3)
    config.model.update(channel_mults=(1, 2), attention_down=(1,), attention_up=(1,), dropout=0.3)
    fields = networks.network_fields(networks.diffusers_network(config), "f")
    expected = configs.flatten(config)
    assert fields == {name: expected[name] for name in fields}
    assert fields["model.dropout"] == 0.3 and fields["data.image_size"] == (16, 24)


FAMILY = [
    {},
    {"norm_eps": 1e-6, "freq_shift": 1, "downsample_padding": 0, "dropout": 0.2},
    {"block_out_channels": [20, 36], "attention_head_dim": 16, "add_attention": False},
    {"num_class_embeds": 10, "resnet_time_scale_shift": "scale_shift", "sample_size": [16, 8]},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, "out_channels": 6},
    {
        "block_out_channels": [8, 8, 16],
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        "downsample_type": "resnet",
    },
]


@pytest.mark.parametrize("fields", FAMILY, ids=str)
def test_a_network_of_the_family_survives(fields):
    """From a config.json to fields and back; what it does not say is diffusers' default."""
    given = json.loads(json.dumps({**networks.DEFAULTS, **network_json(**fields)}))
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(network_json(**fields), "f"))
    checks.check(config, "import")
    found = json.loads(json.dumps(networks.diffusers_network(config)))
    # Import turns the embedding round, and keeps a dropout of which the file says nothing.
    same = found.keys() - {"_diffusers_version", "flip_sin_to_cos", "dropout"}
    assert {name: found[name] for name in same} == {name: given[name] for name in same}


@pytest.mark.parametrize("name", ["defaults", "adm"])
def test_what_diffusers_computes(name, tmp_path):
    """Of float16 weights; padding, heads, ε, the embedding, scale-shift, residual resampling."""
    with np.load(FIXTURES / "family" / name / "expected.npz") as file:
        expected = dict(file)
    loaded = ddpm_jax.load(FIXTURES / "family" / name)
    model, params = configs.make_model(loaded.config), loaded.params
    inputs = [expected[name] for name in ("x_t", "t", "labels") if name in expected]
    found = jax.jit(unet.net_fn(model, params))(*inputs)
    error = np.linalg.norm(found - expected["output"]) / np.linalg.norm(expected["output"])
    assert error <= 1e-5
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: np.float64(np.asarray(leaf)), params)
        net_fn = unet.net_fn(model.clone(dtype=np.dtype("float64")), double)
        found = np.asarray(jax.jit(net_fn)(np.float64(inputs[0]), *inputs[1:]))
    difference = np.linalg.norm(found - expected["output_float64"])
    assert difference <= 1e-12 * np.linalg.norm(found)


@settings(max_examples=100, derandomize=True, database=None, deadline=None)
@given(configs_of_networks())
def test_all_of_the_family_survive(given):
    """The same config.json comes back, but for heads that are one head."""
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(given, "f"))
    checks.check(config, "import")
    found = json.loads(json.dumps(networks.diffusers_network(config)))
    same = given.keys() - {"attention_head_dim"}
    size = given["sample_size"]
    expected = {**given, "sample_size": size[0] if size[0] == size[1] else size}
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    again = configs.default_config()
    again.update_from_flattened_dict(networks.network_fields(found, "f"))
    assert again.model == config.model


def test_where_each_level_s_layers_are():
    """Ours are numbered from the highest resolution on both paths; both names are of one layer."""
    fields = networks.network_fields(network_json(**FAMILY[-1]), "f")
    assert fields["model.attention_down"] == (1, 2) and fields["model.attention_up"] == (0,)
    assert fields["model.resblock_down"] == (1, 2) and fields["model.resblock_up"] == (1,)
    names = {
        "down1_resblock": "down_blocks.0.downsamplers.0",
        "down2_conv": "down_blocks.1.downsamplers.0.conv",
        "up1_resblock": "up_blocks.1.upsamplers.0",
        "up2_conv": "up_blocks.0.upsamplers.0.conv",
        "up0_block1_attention": "up_blocks.2.attentions.1",
    }
    assert {name: interop.tensor_name([name], 3) for name in names} == names


@pytest.fixture
def with_classes(tmp_path):
    """A folder of a network with three classes, and its tensors, which are random."""
    folder, rng = tmp_path / "conditional", np.random.default_rng(0)
    folder.mkdir()
    fields = network_json(num_class_embeds=3, in_channels=1, out_channels=1)
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(fields, "f"))
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = interop.diffusers_tensors(params, 2)
    safetensors.numpy.save_file(tensors, folder / interop.TENSORS)
    return folder, tensors


def test_classes_without_a_null_class(tmp_path, with_classes):
    folder, tensors = with_classes
    workdir = f"--workdir={tmp_path / 'run'}"
    run("import", workdir, f"--weights={folder}")
    saved = run_files.load_config(tmp_path / "run")
    assert (saved.data.num_classes, saved.model.null_class) == (3, False)
    assert saved.train.label_dropout == 0
    run("export", workdir, f"--weights={tmp_path / 'out'}")
    name = "class_embedding.weight"
    out = safetensors.numpy.load_file(tmp_path / "out" / TENSORS)
    assert out[name].tobytes() == tensors[name].tobytes()
    with pytest.raises(UserError, match=r"guidance=2\.0: must be 1.* without a null class"):
        run("sample", workdir, "--config.sample.guidance=2")
    with pytest.raises(UserError, match=r"label_dropout=0\.1: must be 0: the network has no null"):
        run("train", workdir, "--config.data.name=digits", "--config.train.label_dropout=0.1")
    loaded = ddpm_jax.load(folder)
    x, labels = np.zeros((2, 8, 8, 1), np.float32), np.array([0, 2])
    of_classes = jax.jit(lambda x: loaded.predict(x, 10, labels)[0])(x)
    assert np.abs(of_classes[0] - of_classes[1]).max() > 1e-6
    options = {"sampler": "ddim", "num_steps": 2}
    assert loaded.sample(4, label="2", **options).shape == (4, 8, 8, 1)
    with pytest.raises(UserError, match="labels: must be given"):
        loaded.predict(x, 900)


@pytest.mark.usefixtures("no_report")
def test_the_last_class_is_the_null_class(tmp_path, with_classes):
    folder, tensors = with_classes
    workdir, few = f"--workdir={tmp_path / 'run'}", "--config.sample.num_samples=4"
    run("import", workdir, f"--weights={folder}", "--config.model.null_class")
    saved = run_files.load_config(tmp_path / "run")
    assert (saved.data.num_classes, saved.model.null_class) == (2, True)
    quick = ["--config.sample.sampler=ddim", "--config.sample.num_steps=2", few]
    run("sample", workdir, "--config.sample.guidance=2", *quick, "--config.sample.batch_size=4")
    run("export", workdir, f"--weights={tmp_path / 'out'}")
    network = json.loads((tmp_path / "out/unet/config.json").read_text())
    out = safetensors.numpy.load_file(tmp_path / "out" / TENSORS)
    assert network["num_class_embeds"] == 3
    assert out["class_embedding.weight"].tobytes() == tensors["class_embedding.weight"].tobytes()


def test_several_files_with_an_index(tmp_path, weights):
    """As diffusers writes large weights."""
    path = weights / TENSORS
    tensors = safetensors.numpy.load_file(path)
    names, whole = sorted(tensors), interop.read_params(path, references.fixture_config())
    path.unlink()
    refused(tmp_path, weights, f"{path}: no such file")
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for part, chosen in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in chosen}, path.with_name(part))
    refused(tmp_path, weights, f"--weights={path.with_name('a.safetensors')}")
    weight_map = {name: part for part, chosen in parts.items() for name in chosen}
    index = path.with_name(f"{path.name}.index.json")
    for broken, message in (
        ({}, "weight_map: must give each tensor the name of a file"),
        ({"weight_map": {names[0]: "../a.safetensors"}}, "must give each tensor"),
        ({"weight_map": {**weight_map, names[-1]: "a.safetensors"}}, f"there: {names[-1]}"),
        ({"weight_map": {**weight_map, "conv_in.bias": "b.safetensors"}}, "there: conv_in.bias"),
        ({"weight_map": {**weight_map, names[-1]: "c.safetensors"}}, "c.safetensors: no such"),
    ):
        index.write_text(json.dumps(broken))
        refused(tmp_path, weights, message)
    index.write_text(json.dumps({"weight_map": weight_map}))
    again = interop.read_params(index, references.fixture_config())
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    # Beside an index, diffusers does not read the single file; by its name it can be read.
    safetensors.numpy.save_file({name: 2 * tensors[name] for name in names}, path)
    for chosen, factor in ((weights, 1), (path, 2)):
        _, params = interop.read_run(references.fixture_config(), chosen)
        same = jax.tree.map(lambda a, b, f=factor: np.array_equal(a, f * b), params, whole)
        assert all(jax.tree.leaves(same))


def test_one_file_with_its_config_beside_it(tmp_path, weights):
    path = weights / TENSORS
    other = path.with_name("diffusion_pytorch_model.fp16.safetensors")
    path.rename(other)
    refused(tmp_path, weights, f"to read another one, --weights={other}")
    refused(tmp_path, tmp_path / "nothing.safetensors", "no such folder, nor a .safetensors file")
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={other}")
    assert run_files.load_config(tmp_path / "run").diffusion.num_timesteps == 50  # its scheduler
    assert ddpm_jax.load(other).config.model.channels == 8


@pytest.mark.parametrize(
    "channels, kind, said, message",
    [
        (6, "DDPMScheduler", {}, None),
        (6, "DDIMScheduler", {}, None),
        (6, "DDPMScheduler", {"variance_type": "learned_range"}, None),
        (6, "DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, None),
        (6, "DDPMScheduler", {"variance_type": "fixed_small"}, 'must be "learned_range"'),
        (3, "DDPMScheduler", {"variance_type": "learned_range"}, "has no variance"),
    ],
)
def test_a_learned_variance_comes_in(channels, kind, said, message):
    """Of twice as many output channels; the scheduler must not contradict."""
    fields = networks.network_fields(network_json(out_channels=channels), "f")
    scheduler = {"_class_name": kind, **said}
    if message:
        with pytest.raises(UserError, match=message):
            interop.with_scheduler(fields, scheduler, "f")
    else:
        found = interop.with_scheduler(fields, scheduler, "f")
        assert (found["diffusion.variance"], found["diffusion.loss"]) == ("learned_range", "hybrid")


def test_a_learned_variance_keeps_its_meaning(tmp_path):
    """v in [-1, 1] is not a logarithm, whatever the user says."""
    folder, rng = tmp_path / "learned", np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(network_json(out_channels=6)))
    config = configs.default_config()
    config.update_from_flattened_dict(networks.network_fields(network_json(out_channels=6), "f"))
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    safetensors.numpy.save_file(interop.diffusers_tensors(params, 2), folder / interop.TENSORS)
    for variance in ("learned", "fixed_large"):
        change = f"--config.diffusion.variance={variance}"
        refused(tmp_path, folder, f"variance='{variance}': {folder} has 'learned_range'", change)
    improved = "--config=configs/cifar10_improved.py"  # whose variance is learned
    run("import", f"--workdir={tmp_path / 'a'}", f"--weights={folder}", improved)
    run("import", f"--workdir={tmp_path / 'b'}", f"--weights={FIXTURES}", improved)
    chains = [run_files.load_config(tmp_path / name).diffusion for name in "ab"]
    assert [chain.variance for chain in chains] == ["learned_range", "fixed_small"]
    assert [chain.loss for chain in chains] == ["hybrid", "simple"]


def test_cosines_first_is_what_diffusers_means_by_nothing(tmp_path, weights):
    edit(weights / "unet/config.json", flip_sin_to_cos="away")
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}")
    config = run_files.load_config(tmp_path / "run")
    _, params = checkpoint.restore_params(config, tmp_path / "run")
    kernel = safetensors.numpy.load_file(weights / TENSORS)["time_embedding.linear_1.weight"].T
    turned = kernel[[4, 5, 6, 7, 0, 1, 2, 3]]
    np.testing.assert_array_equal(params["temb1"]["kernel"], turned)


def test_raw_or_averaged_weights_go_out(config, tmp_path):
    shapes = unet.param_shapes(configs.make_model(config), configs.image_shape(config))
    trees = [jax.tree.map(lambda s, v=v: np.full(s.shape, v, s.dtype), shapes) for v in (1, 2)]
    with checkpoint.open_manager(tmp_path / "run", config.train) as manager:
        raw, averaged = trees
        state = states.TrainState(np.int32(3), raw, (averaged,), {"count": np.int32(3)})
        checkpoint.save(manager, 3, state)
    for use_ema, value in ((False, 1), (True, 2)):
        config.sample.use_ema = use_ema
        interop.export_run(config, tmp_path / "run", tmp_path / str(use_ema))
        tensors = safetensors.numpy.load_file(tmp_path / str(use_ema) / TENSORS)
        assert all((tensor == value).all() for tensor in tensors.values())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions_survive(prediction):
    config = configs.default_config()
    config.diffusion.prediction = prediction
    fields = schedulers.read_scheduler(schedulers.write_scheduler(config), "f")
    assert fields["diffusion.prediction"] == prediction


SAMPLERS = [
    ({"sample.spacing": "trailing"}, "DDPMScheduler"),
    ({"sample.sampler": "dpmpp", "sample.order": 1}, "DPMSolverMultistepScheduler"),
    ({"sample.sampler": "dpmpp", "sample.spacing": "logsnr"}, "DPMSolverMultistepScheduler"),
    ({"sample.sampler": "dpmpp", "sample.order": 3}, "DPMSolverMultistepScheduler"),
    ({"sample.sampler": "dpmpp_sde", "sample.spacing": "linspace"}, "DPMSolverMultistepScheduler"),
    ({"sample.sampler": "unipc", "sample.order": 3}, "UniPCMultistepScheduler"),
    ({"sample.sampler": "unipc", "sample.spacing": "karras"}, "UniPCMultistepScheduler"),
    ({"sample.sampler": "heun", "sample.spacing": "trailing"}, "HeunDiscreteScheduler"),
    ({"sample.sampler": "plms", "diffusion.clip_x0": False}, "PNDMScheduler"),
    ({"sample.sampler": "dpmpp", "sample.dynamic_threshold": 0.9}, "DPMSolverMultistepScheduler"),
    ({"sample.sampler": "unipc", "diffusion.clip_x0": False}, "UniPCMultistepScheduler"),
    (
        {
            "sample.sampler": "dpmpp",
            "sample.spacing": "trailing",
            "diffusion.zero_terminal_snr": True,
            "diffusion.prediction": "v",
        },
        "DPMSolverMultistepScheduler",
    ),
]


@pytest.mark.parametrize("changes, kind", SAMPLERS, ids=str)
def test_samplers_survive(config, changes, kind):
    config.update_from_flattened_dict(changes)
    scheduler = json.loads(json.dumps(schedulers.write_scheduler(config)))
    assert scheduler["_class_name"] == kind
    fields = schedulers.read_scheduler(scheduler, "f")
    expected = configs.flatten(config)
    assert fields == {name: expected[name] for name in fields}
    assert {name for name in changes if changes[name] not in (False, 0)} <= fields.keys()


@pytest.mark.parametrize("spacing", ["quadratic", "logsnr", "karras"])
def test_a_spacing_that_a_scheduler_does_not_have(config, spacing):
    config.sample.spacing = spacing
    with pytest.raises(UserError, match=f"sample.spacing='{spacing}': DDPMScheduler has only lead"):
        schedulers.write_scheduler(config)


@pytest.mark.parametrize(
    "theirs, ours", [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")]
)
def test_what_a_prediction_type_means(theirs, ours):
    scheduler = {"_class_name": "DDPMScheduler", "prediction_type": theirs}
    assert schedulers.read_scheduler(scheduler, "f")["diffusion.prediction"] == ours


@pytest.mark.parametrize(
    "sampler, kind, spacing, warning",
    [
        ("plms", "PNDMScheduler", "trailing", "unless S divides T, diffusers' PNDMScheduler goes"),
        ("plms", "PNDMScheduler", "leading", ""),
        ("ddim", "DDIMScheduler", "trailing", "unless S divides T, diffusers' DDIMScheduler goes"),
        ("ddim", "DDIMScheduler", "linspace", "diffusers' DDIMScheduler goes from t to t - T // S"),
        ("ancestral", "DDPMScheduler", "linspace", ""),
        ("heun", "HeunDiscreteScheduler", "linspace", "does not round the steps of linspace"),
        ("heun", "HeunDiscreteScheduler", "trailing", ""),
        ("dpmpp", "DPMSolverMultistepScheduler", "trailing", ""),
        ("dpmpp", "DPMSolverMultistepScheduler", "karras", "keeps σ between steps"),
    ],
)
def test_steps_that_diffusers_takes_otherwise(config, caplog, sampler, kind, spacing, warning):
    """Warned of by import and by export; ddim's pipeline makes a DDIMScheduler of its file."""
    config.sample.update(sampler=sampler, spacing=spacing)
    config.diffusion.clip_x0 = sampler != "plms"
    scheduler = schedulers.write_scheduler(config)
    of_export, scheduler["_class_name"] = caplog.text, kind
    caplog.clear()
    schedulers.read_scheduler(scheduler, "f")
    for text in (of_export, caplog.text):
        assert warning in text and bool(text) == bool(warning)


def test_of_two_spacings_karras_is_taken():
    """As in diffusers' set_timesteps."""
    fields = {"use_karras_sigmas": True, "use_lu_lambdas": True}
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", **fields}
    assert schedulers.read_scheduler(scheduler, "f")["sample.spacing"] == "karras"


def test_an_export_that_does_not_fit_on_the_disk(tmp_path, weights, monkeypatch):
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}")

    def fail(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"weights=.*: cannot be used .*No space left"):
        run("export", f"--workdir={tmp_path / 'run'}", f"--weights={tmp_path / 'out'}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_scheduler_s_own_defaults():
    """Fields that a file does not have: linspace, and no clipping."""
    for kind, sampler in (
        ("DPMSolverMultistepScheduler", "dpmpp"),
        ("UniPCMultistepScheduler", "unipc"),
        ("HeunDiscreteScheduler", "heun"),
    ):
        found = schedulers.read_scheduler({"_class_name": kind}, "f")
        assert found["sample.sampler"] == sampler and found["sample.order"] == 2
        assert found["sample.spacing"] == "linspace" and found["diffusion.clip_x0"] is False
    assert (found["diffusion.beta_start"], found["diffusion.beta_end"]) == (0.00085, 0.012)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type="),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4: choose from 1, 2, 3"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, 'must be "midpoint"'),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 'must be "zero"'),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "solver_order=3: choose from 2",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"thresholding": True, "sample_max_value": 2.0},
            "sample_max_value=2.0: must be 1.0",
        ),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, 'solver_type="bh1": must be "bh2"'),
        ("UniPCMultistepScheduler", {"solver_order": 1}, "solver_order=1: choose from 2, 3"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector=[0]"),
        ("UniPCMultistepScheduler", {"solver_order": 2.0}, "solver_order=2.0: choose from"),
        ("DDIMScheduler", {"set_alpha_to_one": False}, "set_alpha_to_one=false: must be true"),
        ("PNDMScheduler", {}, "skip_prk_steps=false: must be true"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "set_alpha_to_one=false: must be true"),
        (
            "PNDMScheduler",
            {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1},
            "steps_offset=1: must be 0",
        ),
        (
            "PNDMScheduler",
            {"skip_prk_steps": True, "set_alpha_to_one": True, "prediction_type": "v_prediction"},
            'prediction_type="v_prediction": must be "epsilon"',
        ),
        (
            "PNDMScheduler",
            {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "linspace"},
            'timestep_spacing="linspace": choose from leading, trailing',
        ),
        ("HeunDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=true"),
        ("HeunDiscreteScheduler", {"sigma_min": 0.1}, "is not supported for Heun"),
    ],
    ids=str,
)
def test_a_sampler_that_is_not_ours(kind, fields, message):
    with pytest.raises(UserError) as error:
        schedulers.read_scheduler({"_class_name": kind, **fields}, "f")
    assert message in str(error.value)


# The scheduler of google/ddpm-cifar10-32.
PUBLISHED = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_made_from_another_one(kind, caplog):
    """It keeps the other one's fields; those that its class does not read change nothing."""
    own = {"_class_name": kind, "timestep_spacing": "leading"}
    clean = {name: PUBLISHED[name] for name in PUBLISHED if name != "clip_sample"}
    if kind == "UniPCMultistepScheduler":
        del clean["variance_type"]
    expected = schedulers.read_scheduler({**own, **clean}, "f")
    assert "ignored" not in caplog.text
    assert schedulers.read_scheduler({**own, **PUBLISHED, "solver_p": None}, "f") == expected
    assert not expected["diffusion.clip_x0"]
    assert f"f: ignored, as {kind} does: clip_sample=true" in caplog.text
    old = {"_class_name": "DDPMScheduler", **PUBLISHED, "tensor_format": "pt"}
    assert schedulers.read_scheduler(old, "f")["diffusion.clip_x0"]


LEARNED_RANGE = {"diffusion.variance": "learned_range", "diffusion.loss": "hybrid"}
PREDICTS_V = {"diffusion.prediction": "v"}


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp"])
def test_a_learned_range_survives(config, sampler):
    """DDPMScheduler takes it; DPMSolverMultistepScheduler cuts it off, of RGB images and ε."""
    config.update_from_flattened_dict({"data.channels": 3, "sample.sampler": sampler})
    config.update_from_flattened_dict(LEARNED_RANGE)
    scheduler = schedulers.write_scheduler(config)
    assert scheduler["variance_type"] == "learned_range"
    assert schedulers.read_scheduler(scheduler, "f")["diffusion.variance"] == "learned_range"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample.sampler": "plms"}, "diffusion.clip_x0=True: PNDMScheduler does not clip"),
        (
            {"sample.sampler": "heun", "sample.dynamic_threshold": 0.9},
            "sample.dynamic_threshold=0.9",
        ),
        ({"sample.sampler": "unipc", "sample.spacing": "logsnr"}, "sample.spacing='logsnr'"),
        ({"sample.sampler": "dpmpp", "sample.spacing": "quadratic"}, "sample.spacing='quadratic'"),
        (  # of four channels, as of v, it would cut another part
            {"data.channels": 1, "sample.sampler": "dpmpp", **LEARNED_RANGE},
            "diffusion.variance='learned_range': DPMSolverMultistepScheduler has only fixed_small",
        ),
        (
            {"data.channels": 3, "sample.sampler": "dpmpp", **LEARNED_RANGE, **PREDICTS_V},
            "diffusion.variance='learned_range': DPMSolverMultistepScheduler has only fixed_small",
        ),
        (
            {
                "sample.sampler": "heun",
                "diffusion.zero_terminal_snr": True,
                "diffusion.prediction": "v",
            },
            "diffusion.zero_terminal_snr=True: HeunDiscreteScheduler has none",
        ),
    ],
    ids=str,
)
def test_a_sampler_that_diffusers_does_not_have(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        schedulers.write_scheduler(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"diffusion.prediction": "mean"},
            "diffusion.prediction='mean': DDPMScheduler has only eps, x0",
        ),
        (
            {"diffusion.variance": "learned", "diffusion.loss": "vlb"},
            "'learned': DDPMScheduler has",
        ),
        ({"model.middle_norm": False}, "diffusers needs model.scale_shift=True for it"),
        ({"model.widths": (16,)}, "model.channels=8: diffusers needs the first level's, 16"),
        (
            {"model.channel_mults": (1, 2), "model.attention_up": (0,), "model.num_heads": 4},
            "model.num_heads=4: diffusers needs the same channels a head; they have [2, 4]",
        ),
        (
            {
                "model.channel_mults": (1, 1, 1),
                "model.attention_down": (0, 1),
                "model.resblock_down": (2,),
            },
            "model.resblock_down=(2,): diffusers needs all or none of the levels",
        ),
    ],
)
def test_what_diffusers_cannot_express(tmp_path, config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        interop.export_run(config, tmp_path, tmp_path / "out")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


NETWORKS = {
    "_class_name": ("UNet2DConditionModel", 'must be "UNet2DModel"'),
    "norm_eps": (0, "must lie in (0, 1)"),
    "downsample_padding": (2, "must be 0 or 1"),
    "freq_shift": (4, "must be a whole number from 0 to 3"),
    "mid_block_type": (None, 'must be "UNetMidBlock2D"'),
    "mid_block_scale_factor": (2, "must be 1"),
    "time_embedding_type": ("fourier", 'must be "positional"'),
    "class_embed_type": ("timestep", "must be null"),
    "num_class_embeds": (1, "whole number above 1"),
    "add_attention": (1, "must be false or true"),
    "act_fn": ("relu", 'must be "silu" or "swish"'),
    "resnet_time_scale_shift": ("spatial", 'must be "default" or "scale_shift"'),
    "downsample_type": ("fir", 'must be "conv" or "resnet" or null'),
    "attention_head_dim": ([8, 16], "a whole number above 0, at most 16"),
    "attn_norm_num_groups": (2, "must be null or norm_num_groups=4"),
    "time_embedding_dim": (64, "must be 32"),
    "out_channels": (9, "must be in_channels=3, or twice as many"),
    "in_channels": (2, "choose from 1, 3, 4"),
    "in_channels ": (5, "2 more than out_channels can only be a label's: --config.data.num_c"),
    "block_out_channels": ([8, "16"], "must be a list of whole numbers"),
    "down_block_types": (["DownBlock2D", "SkipDownBlock2D"], "SkipDownBlock2D is a block with FIR"),
    "up_block_types": (["UpBlock2D"], "must be a list of 2"),
    "sample_size": (None, "--config.data.image_size=H,W"),
    "layers_per_block": (2, "lacks up_blocks.1.resnets.2.conv1.weight"),
    "norm_num_groups": ("4", "whole number above 0"),
    "dropout": (1, "must lie in [0, 1)"),
    "window_size": (7, "is not supported by our U-Net"),
}
SCHEDULERS = {
    "_class_name": ("LCMScheduler", "choose from DDIMScheduler, DDPMScheduler, DPMSolver"),
    "beta_schedule": ("laplace", "choose from linear"),
    "num_train_timesteps": (50.0, "whole number above 0"),
    "beta_start": (0, "must lie in (0, 1)"),
    "beta_end": ("big", "must lie in (0, 1)"),
    "variance_type": ("learned", "choose from fixed_small"),
    "prediction_type": ("flow", "choose from epsilon, sample, v_prediction"),
    "predict_epsilon": (False, "must be true"),
    "thresholding": ("yes", "must be true or false"),
    "clip_sample": ("yes", "must be true or false"),
    "clip_sample_range": (2.0, "must be 1.0"),
    "rescale_betas_zero_snr": (1, "must be true or false"),
    "trained_betas": ([0.1] * 50, "must be those of one of"),
    "shift_terminal": (0.1, "is not supported for DDPMScheduler"),
    "timestep_spacing": ("nonsense", "choose from leading, linspace, trailing"),
    "steps_offset": (1, "must be 0"),
}
MISFITS = [
    # Values that a file can hold, and no network has.
    ("unet/config.json", "sample_size", 9),
    ("unet/config.json", "freq_shift", 0.0),
    ("unet/config.json", "sample_size", 10**20),
    ("unet/config.json", "sample_size", ["8", 8]),
    ("unet/config.json", "norm_num_groups", 3),
    ("unet/config.json", "block_out_channels", [10**9, 2 * 10**9]),
    ("unet/config.json", "block_out_channels", 8),
    ("unet/config.json", "block_out_channels", [0]),
    ("unet/config.json", "down_block_types", {"a": 1}),
    ("unet/config.json", "attention_head_dim", {}),
    ("unet/config.json", "_class_name", []),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**30),
    ("scheduler/scheduler_config.json", "beta_end", 10**400),
    ("scheduler/scheduler_config.json", "trained_betas", [[1], [1, 2]]),
    ("scheduler/scheduler_config.json", "trained_betas", [None] * 50),
    ("scheduler/scheduler_config.json", "beta_schedule", ["linear"]),
    ("scheduler/scheduler_config.json", "_class_name", None),
]


def refused(tmp_path, weights, match, *arguments):
    """Importing raises one line that matches `match`, and writes nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}", *arguments)
    assert match in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("field", NETWORKS)
def test_a_network_that_is_not_ours(tmp_path, weights, field):
    value, message = NETWORKS[field]
    edit(weights / "unet/config.json", **{field.strip(): value})
    refused(tmp_path, weights, message)


@pytest.mark.parametrize("field", SCHEDULERS)
def test_a_scheduler_that_is_not_ours(tmp_path, weights, field):
    value, message = SCHEDULERS[field]
    path = weights / "scheduler/scheduler_config.json"
    edit(path, **{field: value})
    refused(tmp_path, weights, message)
    refused(tmp_path, weights, f"{path}: {field}=")


@pytest.mark.parametrize("case", MISFITS, ids=str)
def test_values_that_fit_nothing(tmp_path, weights, case):
    name, field, value = case
    edit(weights / name, **{field: value})
    refused(tmp_path, weights, f"{weights / name}: {field}=")


def test_a_pipeline_with_more_parts(tmp_path, weights):
    edit(weights / "model_index.json", vqvae=["diffusers", "VQModel"])
    refused(tmp_path, weights, "has vqvae; only unet and scheduler are supported")
    refused(tmp_path, weights / "unet", "has vqvae; only unet and scheduler are supported")
    edit(weights / "model_index.json", vqvae=[None, None])
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}")


def test_the_folder_of_an_ema(tmp_path, weights, caplog):
    """As diffusers' training examples save it, beside the raw parameters."""
    average = weights / "unet_ema"
    shutil.copytree(weights / "unet", average)
    of_ema = {"decay": 0.9999, "power": 0.75, "inv_gamma": 1.0, "optimization_step": 5}
    of_ema |= {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": True}
    edit(average / "config.json", **of_ema)
    tensors = safetensors.numpy.load_file(weights / TENSORS)
    path = average / pathlib.Path(TENSORS).name
    safetensors.numpy.save_file({name: 2 * tensors[name] for name in tensors}, path)
    _, found = interop.read_run(references.fixture_config(), average)
    np.testing.assert_array_equal(found["conv_in"]["bias"], 2 * tensors["conv_in.bias"])
    run("import", f"--workdir={tmp_path / 'ema'}", f"--weights={average}")
    assert run_files.load_config(tmp_path / "ema").diffusion.num_timesteps == 50
    assert "raw parameters" not in caplog.text
    run("import", f"--workdir={tmp_path / 'raw'}", f"--weights={weights}")
    assert f"for their EMA, --weights={average}" in caplog.text
    (average / "config.json").unlink()
    refused(tmp_path, average, "has no config.json")


def test_overrides_of_what_the_folder_says(tmp_path, weights):
    refused(tmp_path, weights, "norm_groups=8: ", "--config.model.norm_groups=8")
    refused(tmp_path, weights, "schedule='cosine': ", "--config.diffusion.schedule=cosine")
    edit(weights / "unet/config.json", sample_size=None)
    free = ["--config.diffusion.variance=fixed_large", "--config.model.dropout=0.2"]
    free += ["--config.data.image_size=16,24"]
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}", *free)
    saved = run_files.load_config(tmp_path / "run")
    assert (saved.diffusion.variance, saved.model.dropout) == ("fixed_large", 0.2)
    assert saved.data.image_size == (16, 24) and saved.model.attention_down == (1,)


def test_places_that_cannot_be_written(tmp_path, weights, monkeypatch):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file" / "run", pathlib.Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"workdir=.*: cannot be used"):
            run("import", f"--workdir={workdir}", f"--weights={weights}")
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    run("import", f"--workdir={link}", f"--weights={weights}")
    assert sorted(p.name for p in target.iterdir()) == ["checkpoints", "config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "target", "weights"]


def test_tensors_that_do_not_fit(tmp_path, weights):
    path = weights / TENSORS
    tensors = safetensors.numpy.load_file(path)
    bias, kernel = tensors.pop("conv_in.bias"), tensors["conv_in.weight"]
    safetensors.numpy.save_file(tensors, path)
    refused(tmp_path, weights, "lacks conv_in.bias")
    safetensors.numpy.save_file({**tensors, "conv_in.bias": bias, "more.bias": bias}, path)
    refused(tmp_path, weights, "should not, more.bias")
    wide = np.zeros((16, *kernel.shape[1:]), np.float32)
    safetensors.numpy.save_file({**tensors, "conv_in.bias": bias, "conv_in.weight": wide}, path)
    refused(tmp_path, weights, "conv_in.weight F32 [16, 3, 3, 3], not F32 [8, 3, 3, 3]")
    safetensors.numpy.save_file({**tensors, "conv_in.bias": np.int32(bias)}, path)
    refused(tmp_path, weights, "conv_in.bias I32 [8], not F32 [8]")
    tensors["conv_in.bias"] = bias
    safetensors.numpy.save_file({**tensors, "step": bias}, path)
    refused(tmp_path, weights, "should not, step")
    name = "mid_block.attentions.0.to_q.weight"
    twice = {**tensors, name.replace("to_q", "query"): tensors[name]}
    safetensors.numpy.save_file(twice, path)
    refused(tmp_path, weights, "under an old and a new name")


def test_weights_of_another_width(tmp_path, weights):
    edit(weights / "unet/config.json", block_out_channels=[16, 32])
    refused(tmp_path, weights, "conv_in.bias F32 [8], not F32 [16]")


def test_damaged_folders(tmp_path, weights):
    refused(tmp_path, tmp_path / "nowhere", "no such folder")
    path = weights / TENSORS
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\x80\x02}q\x00." * 30):
        path.write_bytes(damaged)
        refused(tmp_path, weights, f"{path}: is not a complete safetensors file")
    path.unlink()
    refused(tmp_path, weights, f"{path}: no such file")
    path.with_suffix(".bin").write_bytes(b"\x80\x02}q\x00.")
    refused(tmp_path, weights, "from_pretrained")
    (weights / "unet/config.json").write_text("[" * 200_000)
    refused(tmp_path, weights, "config.json: not valid JSON")
    (weights / "unet/config.json").write_text("{")
    refused(tmp_path, weights, "config.json: not valid JSON")
    (weights / "unet/config.json").unlink()
    refused(tmp_path, weights, "has no config.json")


def test_what_import_and_export_need(tmp_path, weights, config):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refused(tmp_path, weights, "exists, and is not an empty folder")
    workdir = f"--workdir={tmp_path / 'run'}"
    with pytest.raises(UserError, match="--weights: is missing"):
        run("import", workdir)
    with pytest.raises(UserError, match="--weights: is only for --mode=import, export"):
        run("sample", workdir, "--weights=x")
    run_files.save_config(config, tmp_path / "run")
    with pytest.raises(UserError, match="has no checkpoint"):
        run("export", workdir, f"--weights={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"weights=.* is not an empty folder"):
        run("export", workdir, f"--weights={weights}")
    config.model.channel_mults = (2,)
    run_files.save_config(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"channels=8: diffusers needs the first level's, 16"):
        run("export", workdir, f"--weights={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_the_scheduler_beside_the_network_s_folder(tmp_path, weights):
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights / 'unet'}")
    assert run_files.load_config(tmp_path / "run").diffusion.num_timesteps == 50


def test_without_a_scheduler_the_config_decides(tmp_path, weights, caplog):
    shutil.rmtree(weights / "scheduler")
    arguments = ["--config.diffusion.schedule=cosine", "--config.data.name=digits"]
    run("import", f"--workdir={tmp_path / 'run'}", f"--weights={weights}", *arguments)
    saved = run_files.load_config(tmp_path / "run")
    assert (saved.diffusion.schedule, saved.data.name) == ("cosine", "digits")
    assert "no scheduler_config.json" in caplog.text and "schedule=cosine" in caplog.text
