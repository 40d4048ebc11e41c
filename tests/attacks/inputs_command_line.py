"""Bad input on the command line: commands, names, roots, options, settings and files of settings."""

from attacks.cases import cases

NAME = "1 to 100 letters, digits or"
URI = "cannot use … as a folder"
QUICK = "--model linear --train.epochs 1"

COMMANDS = cases(
    "commands",
    "{}",
    {
        "trian": "unknown command 'trian', did you mean 'train'",
        "Train": "unknown command 'Train', did you mean 'train'",
        "train -- --name x": "unexpected extra arguments (--name x",
        "data digits digits": "unexpected extra argument (digits)",
        "tune select": "unknown experiment to tune 'select'",
    },
)

NAMES = cases(
    "the name of a run",
    "train --name={} --model linear --train.epochs 1",
    dict.fromkeys(
        [
            *(
                "",
                "..",
            ),
            *("'"),
        ],
        f"--name … {NAME}",
    ),
)

NAMES_BELOW_A_URI = cases(
    "the name of a run below a URI",
    "train --name={} --root file:///tmp/effray-no-such-root --model linear --train.epochs 1",
    dict.fromkeys(["#x", "%2e%2e", "a#b"], f"--name … {NAME}"),
)

TAKEN_NAMES = cases(
    "a name that is taken",
    "{}",
    {
        f"train --name t {QUICK}": "run 't' exists in … --resume t",
        "select --name sel --model-from t": "run 'sel' exists in",
        "tune crest --name sweep": "sweep 'sweep' exists in",
    },
)

NAMES_TO_RESUME = cases(
    "the name to resume",
    "train --resume={}",
    dict.fromkeys(
        ["", " ", "/etc"],
        "unknown train run in … Allowed: stopped, t",
    ),
)

RUNS_TO_SHOW = cases(
    "the run to show",
    "show {}",
    dict.fromkeys(
        ["", " ", "a\nb"],
        "unknown run in runs",
    ),
)

RUNS_TO_COMPARE = cases(
    "the run to compare with",
    "show l --against={}",
    {
        "nope": "unknown run in runs 'nope'",
        "sweep": "sweep … only runs are compared",
        "rows.csv": "unknown run in runs 'rows.csv'",
    },
)

ROOTS = cases(
    "the root",
    f"train {QUICK} --root={{}}",
    {
        "loop": "cannot write … loop … Too many levels",
        "x" * 300: "cannot write … File name too long",
        "s3://KEY:SECRET@bucket?endpoint_override=127.0.0.1:1&scheme=http": "cannot list 'bucket … 127.0.0.1:1",
    },
    make=lambda folder, _: (folder / "loop").symlink_to("loop"),
)

ROOTS_TO_READ = cases(
    "the root of a run to show",
    "show t --root={}",
    {
        "rows.csv": "unknown run in rows.csv 't'",
        "file:///nowhere": "unknown run in file:///nowhere 't'",
        "s3://KEY:SECRET@bucket?endpoint_override=127.0.0.1:1&scheme=http": "cannot list 'bucket … 127.0.0.1:1",
    },
)

PAIRS = cases(
    "--set",
    f"train {QUICK} --set {{}}",
    {
        "train={lr=-1}": "train.lr = -1: input should be greater than 0",
        "dataset.options=3": "dataset.options = … dictionary",
        "hooks=agnt": "unknown hook 'agnt', did you mean 'agent'",
        "model_config=3": "unknown setting 'model_config'",
    },
)

VALUES = cases(
    "a setting",
    "{}",
    {
        "train --seed -1": "seed = '-1' … greater than or equal to 0",
        "train --train.epochs 0": "train.epochs = '0' … greater than or equal to 1",
        "train --train.milestones 0": "train.milestones.0 = '0' … greater than 0",
        "train --train.optimizer Adam": "unknown train.optimizer 'Adam', did you mean 'adamw'",
        "train --dataset.only nope.parquet": "there is no coreset file … nope.parquet",
        "train --dataset.digest 0": "dataset 'digits' gives other samples than those",
        "train --model resnet8:": "'resnet8' takes nothing after a colon",
        "train --model resnet7": "unknown model 'resnet7', did you mean 'resnet",
        "train --hooks agent --hooks agnt": "unknown hook 'agnt', did you mean 'agent'",
        "train --select false --select.fraction 0.5": "select = false: select.fraction would do nothing",
        "crest --crest.order 3": "crest.order = '3' … less than or equal to 2",
        "crest --hooks crest": "hook 'crest' is named twice, or is the method's own",
        "sparse --density 0.1 --growth rndom": "unknown growth rule 'rndom', did you mean 'random'",
        "sparse --density 0.1 --sparse-init dense": "sparse_init = dense with growth = random",
        "sparse --density 0.1 --update_every_steps 99999": "update_every_steps = 99999 is not below",
        "sparse --density 0.1 --compute sparse --agent": "compute = sparse does not go with agent",
        "select --model-from nope --rule grand": "unknown run in … 'nope' … Allowed: cr, dg, halfway, l, sp, t",
        "select --model-from sel --rule grand": "run 'sel' has no model.safetensors: it trained no model",
    },
)

CONFIG_FILES = cases(
    "a settings file",
    "train --config mine.toml --train.epochs 1 --model linear",
    {
        "'seed ' = 3": "unknown setting 'seed ', did you mean 'seed'",
        "Seed = 3": "unknown setting 'Seed', did you mean 'seed'",
        "model = {options = {}, nam = 'mlp'}": "unknown setting 'model.nam', did you mean 'model.name'",
        "[[hooks]]\nname = 'agent'\nnorm = 3": "unknown setting 'hooks.0.norm'",
        "[cluster]\nworker = 3": "unknown setting 'cluster.worker', did you mean 'cluster.workers'",
        "[select]\nevery = 3": "select.every is now called select.every_epochs",
        "no text": (b"\xff\xfe\x00", "'mine.toml' is not valid TOML … 0xff in position 0"),
    },
    into="mine.toml",
)

CONFIGS = cases(
    "the settings file",
    "train --config {}",
    {
        "nowhere.toml": "cannot read the settings file 'nowhere.toml'",
        ".": "cannot read the settings file '.'",
        "runs": "cannot read the settings file 'runs'",
    },
)

RESUMED_OTHERWISE = cases(
    "resuming with other settings",
    "train --resume stopped --set={}",
    {
        "seed=1": "--resume stopped keeps the settings: seed cannot change",
        "train.epochs=99": "--resume stopped keeps the settings: train.epochs cannot change",
        "nope=1": "--resume stopped keeps the settings: nope cannot change",
    },
)
