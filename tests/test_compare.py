"""Evaluations side by side, and which of their differences are noise."""

import contextlib
import json
import math

import numpy as np
import pytest

from ddpm_jax import cli
from ddpm_jax.errors import UserError
from ddpm_jax.runs import compare


def test_what_cannot_be_compared(tmp_path):
    """Scores of other data, of other numbers of images, or of other features."""
    found = {
        "fid": 3.5, "kid": 0.1, "bits_per_dim": 3.0, "dataset": "a", "split_sha256": "a",
        "eval_split_sha256": "a", "image_size": [8, 8], "channels": 1, "num_samples": 10,
        "weights_sha256": "a", "ema": True, "label": "", "scored_features": [5, 5],
        "bits_per_dim_sha256": "a", "bits_per_dim_images": 5, "closer_to_train_pixels": 0.5,
        "nearest_images": 9, "with_mirror_images": False,
    }  # fmt: skip
    scores = ("fid", "kid", "bits_per_dim", "closer_to_train_pixels")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(found))
    for name in found.keys() - set(scores):
        (tmp_path / "b" / "evaluation.json").write_text(json.dumps({**found, name: "another"}))
        with pytest.raises(UserError, match=f"cannot be compared, it differs in {name} "):
            compare.compare([tmp_path / "a", tmp_path / "b"])


def test_compare(tmp_path, capsys):
    found = {"fid": 3.5, "kid": 0.1, "kid_error": 0.01, "num_samples": 10, "resize": "tf1"}
    for name, changes in (("a", {}), ("b", {"fid": 4.5, "step": 7}), ("c", {"resize": "torch"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({**found, **changes}))
    cli.run(["main.py", "--mode=compare", f"--workdirs={tmp_path / 'a'},{tmp_path / 'b'}"])
    text = capsys.readouterr().out
    assert "| fid | 3.5 | 4.5 |" in text and "| kid | 0.1 ± 0.01 | 0.1 ± 0.01 |" in text
    with pytest.raises(UserError, match=r"fid cannot .* differs in resize tf1 / torch$"):
        compare.compare([tmp_path / "a", tmp_path / "c"])
    progressive = [{"steps": 2, "rate": 1.0, "rmse": 3.0}]
    for name, steps in (("a", 2), ("b", 4)):
        code = [{**progressive[0], "steps": steps}]
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"progressive": code}))
    compare.compare([tmp_path / "a", tmp_path / "b"])
    text = capsys.readouterr().out
    assert "after 2 steps | 1.00000, 3.00000 |  |" in text
    assert "after 4 steps |  | 1.00000, 3.00000 |" in text
    code = [{**progressive[0], "rmse": None}]  # what was not finite
    other = {"fid": None, "kid": 0.5, "kid_error": None, "progressive": code}
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(other))
    compare.compare([tmp_path / "b"])
    text = capsys.readouterr().out
    assert "| fid | nan |" in text and "| kid | 0.5 |" in text and "| 1.00000, nan |" in text
    (tmp_path / "b" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        compare.compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match=r"--workdirs=.*: has no evaluation\.json"):
        compare.compare([tmp_path / "a", tmp_path / "d"])
    for flags, message in (
        ([], "--workdirs: is missing; needed by --mode=compare"),
        (["--workdirs=a"], "compare needs two or more"),
        (["--workdirs=a,a"], "compare needs two or more"),
        (["--workdirs=a,b", "--config.seed=1"], "--config.seed=1: compare takes only --workdirs"),
        (["--workdirs=a,b", "--workdir=c"], "--workdir: compare takes only --workdirs"),
        (["--workdirs=a,b", "--distributed"], "--distributed: is only for "),
    ):
        with pytest.raises(UserError, match=message):
            cli.run(["main.py", "--mode=compare", *flags])
    with pytest.raises(UserError, match="--workdirs: is only for --mode=compare"):
        cli.run(["main.py", "--config=configs/digits.py", "--workdirs=runs/mine"])


def one(fid, **fields):
    return {"fid": fid, "params_sha256": str(fid), **fields}


@pytest.mark.parametrize(
    "base, other, score, expected",
    [
        # One seed each, no error: 1.3 % of 4 are 0.052.
        (one(3.975), one(4.025), "fid", "+0.05, within noise"),
        (one(4.03), one(3.97), "fid", "-0.06"),
        # Spreads of 0.06 over 4 seeds and 0.12 over 9: √(0.03² + 0.04²) = 0.05, twice that is 0.1.
        (
            one(4.0, fid_spread=0.06, num_seeds=4, params_sha256="a"),
            one(4.099, fid_spread=0.12, num_seeds=9, params_sha256="a"),
            "fid",
            "+0.099 ± 0.05, within noise",
        ),
        (
            one(4.0, fid_spread=0.06, num_seeds=4, params_sha256="a"),
            one(4.101, fid_spread=0.12, num_seeds=9, params_sha256="a"),
            "fid",
            "+0.101 ± 0.05",
        ),
        # With hardly a spread: noise between two trainings, but not within one.
        (
            one(4.0, fid_spread=0.002, num_seeds=4),
            one(4.04, fid_spread=0.002, num_seeds=4),
            "fid",
            "+0.04 ± 0.0014, within noise",
        ),
        (
            one(4.0, fid_spread=0.002, num_seeds=4, params_sha256="a"),
            one(4.04, fid_spread=0.002, num_seeds=4, params_sha256="a"),
            "fid",
            "+0.04 ± 0.0014",
        ),
        (
            {"kid": 0.01, "kid_error": 0.003},
            {"kid": 0.0199, "kid_error": 0.004},
            "kid",
            "+0.0099 ± 0.005, within noise",
        ),
        (
            {"kid": 0.01, "kid_error": 0.003},
            {"kid": 0.0201, "kid_error": 0.004},
            "kid",
            "+0.0101 ± 0.005",
        ),
        # The error is the standard deviation of ten, with ddof = 0: √(2 · 0.3² / 9) = 0.141.
        (
            {"inception_score": 9.0, "inception_score_error": 0.3},
            {"inception_score": 9.3, "inception_score_error": 0.3},
            "inception_score",
            "+0.3 ± 0.14",
        ),
        ({"precision": 0.5}, {"precision": 0.25}, "precision", "-0.25"),
        ({"sfid": 4.0}, {"sfid": 4.01}, "sfid", "+0.01"),  # its noise is not known
        ({"kid": 0.1, "kid_error": None}, {"kid": 0.2, "kid_error": 0.3}, "kid", "+0.1"),
        ({"kid": 0.1, "kid_error": math.nan}, {"kid": 0.2, "kid_error": 0.3}, "kid", "+0.1"),
        ({"fid": math.nan}, one(4.0), "fid", "+nan"),
        ({"kid": 0.1}, one(4.0), "fid", ""),
    ],
)
def test_differences(base, other, score, expected):
    assert compare.difference(base, other, score) == expected


def evaluation_of_images(folder, means, of_images):
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(means))
    np.savez(folder / "evaluation.npz", **{f"of_images_{k}": x for k, x in of_images.items()})


def test_bits_per_dim_of_the_same_images_are_compared_in_pairs(tmp_path, capsys):
    """Images that differ by far more than the runs do."""
    base = np.array([1.0, 3.0, 5.0, 7.0])
    other = base + np.array([0.2, 0.4, 0.2, 0.4])  # 0.3 on average, 0.2 / √3 / 2 = 0.058
    for name, values in (("a", base), ("b", other)):
        error = values.std(ddof=1) / 2
        means = {"bits_per_dim": values.mean(), "bits_per_dim_error": error, "rate": 1.0}
        means |= {"rate_error": 3.0}
        evaluation_of_images(tmp_path / name, means, {"bits_per_dim": values, "rate": values})
    compare.compare([tmp_path / "a", tmp_path / "b"])
    text = capsys.readouterr().out
    assert "| bits_per_dim | 4 ± 1.3 | 4.3 ± 1.3 |" in text
    assert "| bits_per_dim | +0.3 ± 0.058 (paired) |" in text
    # The file has rates of another evaluation, whose mean is 4.
    assert "| rate | +0 ± 4.2, within noise |" in text and "of_images" not in text
    (tmp_path / "b" / "evaluation.npz").unlink()  # as an earlier version left it
    compare.compare([tmp_path / "a", tmp_path / "b"])
    assert "| bits_per_dim | +0.3 ± 1.8, within noise |" in capsys.readouterr().out
    whole = (tmp_path / "a" / "evaluation.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):  # a flipped byte is an error of the user, or is not noticed
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 0xFF
        (tmp_path / "b" / "evaluation.npz").write_bytes(damaged)
        with contextlib.suppress(UserError):
            compare.compare([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "evaluation.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"evaluation\.npz: .*; evaluate the run again"):
        compare.compare([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "evaluation.json").write_text('{"kid": 0.1}')  # it is not needed
    compare.compare([tmp_path / "a", tmp_path / "b"])


def test_differences_are_from_the_first(tmp_path, capsys):
    for name, fid in (("a", 4.0), ("b", 4.5), ("c", 4.01)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(one(fid)))
    compare.compare([tmp_path / name for name in "abc"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == f"| minus {tmp_path / 'a'} | {tmp_path / 'b'} | {tmp_path / 'c'} |"
    assert lines[-1] == "| fid | +0.5 | +0.01, within noise |"
    assert any("1 to 2 %" in line for line in lines)
