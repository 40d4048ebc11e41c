"""Bad input on the command line, and in files of settings."""

import os

from attacks.cases import cases

QUICK = "--model linear --train.epochs 1"
NAME = "--name … 1 to 100 letters, digits or"
BUCKET = "s3://KEY:SECRET@bucket?endpoint_override=127.0.0.1:1&scheme=http"
LONG = "x" * 5000
DEEP = "[" * 5000 + "]" * 5000
BEYOND_UTF8 = "a\udcff=1"  # what Python makes of the byte 0xff in an argument

NAMES = cases(
    "names",
    "{}",
    {
        "trian": "unknown command 'trian', did you mean 'train'",
        "train -- --name x": "unexpected extra arguments (--name x",
        f"train --name=.. {QUICK}": NAME,
        f"train --name=%2e%2e --root file:///tmp/effray-no-such-root {QUICK}": NAME,
        f"train --name t {QUICK}": "run 't' exists in … --resume t",
        "select --name sel --model-from t": "run 'sel' exists in",
        "tune crest --name sweep": "sweep 'sweep' exists in",
        "show ''": "unknown run in runs",
        "show l --against=rows.csv": "unknown run in runs 'rows.csv'",
        "select --model-from nope --rule grand": "unknown run in … 'nope' … Allowed: cr, dg, halfway, l, sp, t",
        "select --model-from sel --rule grand": "run 'sel' has no model.safetensors: it trained no model",
        "export sel": "it trained no model",
    },
)

ROOTS = cases(
    "roots",
    "{}",
    {
        f"train {QUICK} --root=loop": "cannot write … loop … Too many levels",
        f"train {QUICK} --root={'x' * 300}": "cannot write … File name too long",
        f"train {QUICK} --root=s3:": "cannot use 's3:' as a folder: a URI has // behind",
        f"train {QUICK} --root='{BUCKET}'": "cannot list 'bucket … 127.0.0.1:1",
        "show t --root=rows.csv": "unknown run in rows.csv 't'",
        "show t --root=file:///nowhere": "unknown run in file:///nowhere 't'",
        f"show t --root='{BUCKET}'": "cannot list 'bucket … 127.0.0.1:1",
    },
)

CACHES = cases(
    "caches",
    f"train --dataset table:rows.csv {QUICK}",
    {"s3://bucket/cache": "EFFRAY_CACHE = s3://bucket/cache: the cache is a local folder"},
    variable="EFFRAY_CACHE",
)

SETTINGS = cases(
    "settings",
    "{}",
    {
        "train --dataset.only nope.parquet": "there is no coreset file … nope.parquet",
        "train --dataset.only few.parquet": "2 of the 20 samples in … few.parquet are held out here",
        "train --model resnet8:": "'resnet8' takes nothing after a colon",
        "train --select false --select.fraction 0.5": "select = false: select.fraction would do nothing",
        f"train --seed 1{'0' * 5000}": "seed = '1000 … unable to parse input string as an integer, exceeded maximum",
        f"train --model {LONG}": "unknown model 'x … x'",
        "sparse --density 0.1 --sparse-init dense": "sparse_init = dense with growth = gradient",
        "sparse --density 0.5 --multiplier 1000000000000": "multiplier = '1000000000000'",
        "tune crest --space nowhere.py": "there is no space file 'nowhere.py'",
        "tune crest --resume nope": "unknown sweep in … 'nope' … Allowed: sweep",
        "tune crest --resume sweep --concurrent 0": "'--concurrent': 0 is not in the range",
    },
)

NO_NUMBERS = cases(
    "a number that is none", f"train {QUICK} --train.lr {{}}", dict.fromkeys(["nan", "1e999", ""], "train.lr = ")
)

PAIRS = cases(
    "--set",
    f"train {QUICK} --set {{}}",
    {
        "dataset.options=3": "dataset.options = … dictionary",
        "model.name={a=1}": "model.name = {'a': 1}: input should be a valid string",
        "seed=1\nmodel='mlp'": "seed = ",
        f"model.options.depth={DEEP}": "unknown linear option 'depth'",
        "model.options." + "a." * 5000 + "b=1": "no setting has 5003 parts",
        LONG: "--set 'x … x' is not of the form KEY=VALUE",
        '"a.b"=1': "unknown setting '\"a'",
        "train=false": "train = false: train.epochs would do nothing",
    },
)

NO_TEXT = cases(
    "an argument that is not text",
    "{}",
    {
        f"train {QUICK} {option} '{BEYOND_UTF8}'": "is not UTF-8 text"
        for option in ("--model", "--set", "--config", "--name", "--root", "--resume", "--coreset")
    },
)

CONFIG_FILES = cases(
    "a settings file",
    "train --config mine.toml --train.epochs 1 --model linear",
    {
        "dataset = false": "dataset = False: input should be a valid dictionary",
        f"seed = {DEEP}": "'mine.toml' is not valid TOML: its brackets are nested too deeply",
        "[model.options]\nx = " + "[" * 100 + "]" * 100: "'mine.toml' has values nested more than 32 deep",
        "seed = 1" + "0" * 5000: "'mine.toml' is not valid TOML: Exceeds the limit",
        "a mark of UTF-8": (b"\xef\xbb\xbfseed = 'x'", "seed = 'x'"),
        "no text": (b"\xff\xfe\x00", "'mine.toml' is not valid TOML … 0xff in position 0"),
    },
    into="mine.toml",
)

CONFIGS = cases(
    "the settings file",
    "train --config {}",
    {"nowhere.toml": "cannot read the settings file 'nowhere.toml'", "runs": "cannot read the settings file 'runs'"},
)
NO_FILES = cases(
    "what is no regular file",
    "{}",
    {
        "train --config pipe": "cannot read the settings file 'pipe': it is not a regular file",
        "tune crest --space pipe.py": "cannot read the space 'pipe.py': it is not a regular file",
        f"train {QUICK} --coreset pipe": "pipe … it is not a regular file",
        f"train {QUICK} --dataset.only zero": "zero … it is not a regular file",
        f"train {QUICK} --train.from pipe.safetensors": "pipe.safetensors … it is not a regular file",
        "deltagrad delete dg --ids pipe": "ids in 'pipe' cannot be read: it is not a regular file",
    },
    make=lambda folder, _: [
        *(os.mkfifo(folder / name) for name in ("pipe", "pipe.py", "pipe.safetensors")),
        *((folder / name).symlink_to("/dev/zero") for name in ("zero", "zero.py")),
    ],
    leaves=("runs/train/digits-*",),
)
