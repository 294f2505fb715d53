"""What the SLURM launcher makes of its arguments, and what a batch script is told."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_sft import batch_job, cli, lease, runs, slurm, slurm_options, slurm_queue, status
from dist_sft.batch_job import Fate, Job
from dist_sft.config import read_recipe
from dist_sft.errors import UserError
from dist_sft.runs import Outcome

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a recipe and its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


def recipe(**sections: Any) -> dict[str, Any]:
    return {
        "run_dir": "runs/my run",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "hub/name"},
        "data": {"train": [{"path": "rows.json"}]},
        **sections,
    }


def generation() -> dict[str, Any]:
    return {
        "run_dir": "runs/my run",
        "model": {"path": "hub/name"},
        "input": [{"path": "rows.json"}],
        "output": {"path": "answers.jsonl"},
    }


class Says:
    """Puts an answer into the mouth of SLURM's commands; keeps what they were given."""

    environment: dict[str, str]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, stdout: str = "", stderr: str = "", code: int = 0) -> list[list[str]]:
        asked = list[list[str]]()

        def call(
            words: list[str], env: dict[str, str] | None = None
        ) -> subprocess.CompletedProcess[str]:
            asked.append(words)
            if env is not None:
                self.environment = env
            if words[0] == "squeue" and "PENDING" not in stdout and "slurm_load" not in stderr:
                return subprocess.CompletedProcess(words, 0, "", "")
            return subprocess.CompletedProcess(words, code, stdout, stderr)

        self._monkeypatch.setattr(slurm_queue, "call", call)
        return asked


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    return Says(monkeypatch)


SIZE = ["--nodes=2", "--workers-per-node=8"]


@pytest.mark.parametrize(
    ("given", "ours", "sbatch"),
    [
        ("train r.yaml --nodes 2 --partition a100", "train r.yaml --nodes 2", "--partition a100"),
        ("--time=1:00 train r.yaml seed=3", "train r.yaml seed=3", "--time=1:00"),
        ("train --exclusive r.yaml --nodes=1-2", "train r.yaml --nodes=1-2", "--exclusive"),
        ("train r.yaml -A me -pgpu seed=1", "train r.yaml seed=1", "-A me -pgpu"),
        ("train r.yaml --export ALL,A=1 --dry-run", "train r.yaml --dry-run", "--export ALL,A=1"),
        (
            "train r.yaml --wait-all-nodes=1 --exclude n1",
            "train r.yaml",
            "--wait-all-nodes=1 --exclude n1",
        ),
    ],
)
def test_what_is_not_ours_goes_to_sbatch(given: str, ours: str, sbatch: str) -> None:
    parts = slurm_options.split(given.split(), slurm_options.parser())
    assert parts == (ours.split(), sbatch.split())


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--ntasks-per-node=8", "--workers-per-node"),
        ("-n", "--workers-per-node"),
        ("-n8", "--workers-per-node"),
        ("-N4", "--nodes"),
        ("-a0-3", "--sweep"),
        ("--signal=B:TERM@10", "--lead"),
        ("--sig=B:TERM@10", "--lead"),
        ("--array=0-3", "--sweep"),
        ("--no-requeue", "--no-put-back"),
        ("--test-only", "--dry-run"),
        ("-o", "run_dir, which has the logs"),
    ],
)
def test_what_would_break_a_run_is_refused(
    option: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main(["train", "recipe.yaml", *SIZE, option]) == runs.WRONG_INPUT
    name = option.partition("=")[0] if option.startswith("--") else option[:2]
    assert capsys.readouterr().err == (
        f"{name}: this option of sbatch is set by dist_sft; use {instead}\n"
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--worker-per-node=8", "--workers-per-node"),
        ("--node=2", "--nodes"),
        ("--exclude-bad-node", "--exclude-bad-nodes"),
        ("--restart=0", "--restarts"),
        ("--dryrun", "--dry-run"),
        ("--no-putback", "--no-put-back"),
    ],
)
def test_what_is_nearly_ours_is_not_sbatchs(
    given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main(["train", "recipe.yaml", *SIZE, given]) == runs.WRONG_INPUT
    assert capsys.readouterr().err == (
        f"{given.partition('=')[0]}: no option of launch/slurm.py; did you mean {meant}?\n"
    )


@pytest.mark.parametrize(
    "option", ["--nodelist", "--sockets-per-node", "--cores-per-socket", "--nodefile", "--prefer"]
)
def test_what_sbatch_has_is_not_taken_for_a_mistake(option: str) -> None:
    words = ["train", "r.yaml", option, "2"]
    assert slurm_options.split(words, slurm_options.parser()) == (words[:2], words[2:])


@pytest.mark.parametrize("task", ["train", "generate"])
def test_a_dry_run_prints_what_would_be_used(
    task: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if task == "generate":
        (here / "recipe.yaml").write_text(yaml.safe_dump(generation()))
    options = ["--partition", "a100", "--time=12:00:00", "--lead=600", "--dry-run"]
    assert slurm.main([task, "recipe.yaml", "seed=7", *SIZE, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == "no GPUs are asked for (--gpus-per-node): workers run on CPUs\n"
    printed = captured.out.replace(str(here), "HERE").replace(runs.code_revision(), "REVISION")
    printed = printed.replace(str(slurm.files()), "SLURM").replace(sys.executable, "PYTHON")
    config = read_recipe("recipe.yaml", [f"job={task}", "seed=7"]).to_json()
    for text in (config, (slurm.files() / "site.sh").read_text()):
        assert text in printed
        printed = printed.replace(text, "...\n")
    golden = {"train": "slurm_dry_run.txt", "generate": "slurm_dry_run_generate.txt"}
    assert printed == (GOLDEN / golden[task]).read_text()
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nodes=0"], "--nodes: got 0; allowed: N, or MIN-MAX with MIN up to MAX"),
        (["--nodes=4-2"], "--nodes: got 4-2; allowed: N, or MIN-MAX"),
        (["--workers-per-node=0"], "--workers-per-node: got 0; allowed: 1 or more"),
        (["--site=nowhere.sh"], "--site: nowhere.sh is no file"),
        (["--sweep=optimizer.lr"], "--sweep: got optimizer.lr; allowed: KEY=A,B,..."),
        (["--sweep=seed=1,2", "--chain=2"], "--sweep and --chain: give one of them"),
        (["--restarts=-1"], "--restarts: got -1; allowed: 0 or more"),
        (["train.stepz=3"], "train.stepz"),
        (["data.train.0.path=missing.json"], "missing.json: no such file or folder"),
    ],
)
def test_mistakes_are_found_on_the_login_node(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert slurm.main(["train", "recipe.yaml", *SIZE, *arguments]) == runs.WRONG_INPUT
    assert told in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_no_sbatch_no_run_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert slurm.main(["train", "recipe.yaml", *SIZE]) == runs.WRONG_INPUT
    assert "sbatch is not on PATH: launch on a login node" in capsys.readouterr().err
    assert not (here / "runs").exists()
    assert slurm.main(["train", "recipe.yaml", *SIZE, "--prepare"]) == 0


def test_a_sweep_has_a_folder_for_every_combination(here: Path) -> None:
    axes = ["--sweep=optimizer.lr=1e-5,2e-5", "--sweep=seed=1,2", "--prepare"]
    assert slurm.main(["train", "recipe.yaml", *SIZE, *axes]) == 0
    where = here / "runs/my run"
    listed = (where / "sweep.txt").read_text().splitlines()
    assert listed == [
        f"{where}/optimizer.lr={lr},seed={seed}" for lr in ("1e-5", "2e-5") for seed in (1, 2)
    ]
    for folder in listed:
        config = json.loads((Path(folder) / "config.json").read_text())
        assert folder.endswith(f"seed={config['seed']}")
        assert (Path(folder) / "site.sh").exists()


@pytest.mark.parametrize(
    ("axis", "answers"),
    [
        ("seed=1,2", ["answers-seed=1.jsonl", "answers-seed=2.jsonl"]),
        ("output.path=a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_each_run_of_a_sweep_has_answers_of_its_own(
    here: Path, axis: str, answers: list[str]
) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump(generation()))
    assert slurm.main(["generate", "recipe.yaml", *SIZE, f"--sweep={axis}", "--prepare"]) == 0
    folders = (here / "runs/my run/sweep.txt").read_text().splitlines()
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in folders]
    assert [config["output"]["path"] for config in configs] == answers


def test_a_sweep_that_is_launched_again_leaves_no_run_out(
    here: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs keep their numbers, those that have finished are not submitted, and new ones follow."""
    sweep = ["train", "recipe.yaml", *SIZE, "--sweep=seed=1,2,3"]
    assert slurm.main([*sweep, "--prepare"]) == 0
    where = here / "runs/my run"
    finished = where / "seed=1"
    monkeypatch.setattr(runs, "is_finished", lambda recipe: Path(recipe.run_dir).name == "seed=1")
    asked = says("7\n")
    assert slurm.main([*sweep[:-1], "--sweep=seed=1,3,4"]) == 0
    (submitted,) = [words for words in asked if words[0] == "sbatch"]
    assert "--array=2,3" in submitted
    assert f"--output={where}/logs/slurm-%A_%a.out" in submitted
    listed = (where / "sweep.txt").read_text().splitlines()
    assert listed == [f"{where}/seed={seed}" for seed in (1, 2, 3, 4)]
    assert slurm_queue.jobs_of(finished) == []
    assert slurm_queue.jobs_of(where / "seed=4") == ["7_3"]
    says("7_2 PENDING Resources\n")
    assert slurm.main([*sweep[:-1], "--sweep=seed=5"]) == runs.WRONG_INPUT, "7_2 needs the list"


def test_a_job_is_submitted_from_wherever(
    here: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "3")  # inside of another job
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    asked = says("7\n")
    assert slurm.main(["train", "recipe.yaml", *SIZE]) == 0
    (first,) = [words for words in asked if words[0] == "sbatch"]
    assert {name for name in says.environment if "SLURM" in name} == {"SLURM_CONF"}
    says("")
    monkeypatch.chdir(here / "runs")
    asked = says("8\n")
    monkeypatch.setattr(slurm, "refuse_a_second_job", lambda folder: None)
    assert slurm.main(["resume", "my run"]) == 0
    assert [words for words in asked if words[0] == "sbatch"] == [first]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-1", 176400), ("1-1:1:1", 90061),
     ("1-0:30", 88200), ("UNLIMITED", None), ("1:2:3:4", None)],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_does(time: str, seconds: int | None) -> None:
    assert slurm_options.seconds_of(time) == seconds


@pytest.mark.parametrize(("time", "code"), [(["--time=5"], 2), (["-t", "6"], 0)])
def test_a_time_limit_that_the_lead_uses_up_is_refused(
    time: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.main(["train", "recipe.yaml", *SIZE, *time, "--dry-run"]) == code
    assert ("--time: 5 leaves no time to work" in capsys.readouterr().err) == bool(code)


def test_a_submission_that_slurm_refuses_changes_nothing(
    here: Path, says: Says, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"stderr": "sbatch: error: invalid partition specified: a100\n", "code": 1}
    run_dir = here / "runs/my run"
    says(**refused)
    assert slurm.main(["train", "recipe.yaml", *SIZE, "--partition=a100"]) == runs.WRONG_INPUT
    assert "sbatch refused the job: sbatch: error: invalid partition" in capsys.readouterr().err
    assert not run_dir.exists()
    says("7\n")
    assert slurm.main(["train", "recipe.yaml", *SIZE, "--partition=low"]) == 0
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    says(**refused)
    assert slurm.main(["train", "recipe.yaml", "seed=3", *SIZE, "-p", "a100"]) == runs.WRONG_INPUT
    after = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert after == before


def test_a_site_file_that_bash_does_not_understand(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "site.sh").write_text("if true; then\n")
    assert slurm.main(["train", "recipe.yaml", *SIZE, "--site=site.sh"]) == runs.WRONG_INPUT
    assert "--site: bash does not understand it: site.sh: line 2: " in capsys.readouterr().err


# ---- what SLURM says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "for_ever"),
    [
        ("PartitionNodeLimit", True),
        ("PartitionTimeLimit", True),
        ("QOSMaxNodePerJobLimit", True),
        ("InvalidAccount", True),
        ("Resources", False),
        ("Priority", False),
        ("Dependency", False),
        ("QOSMaxJobsPerUserLimit", False),
    ],
)
def test_a_job_that_may_never_start_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str, for_ever: bool
) -> None:
    answers = {"sbatch": "7\n", "squeue": f"7 PENDING {reason}\n"}
    monkeypatch.setattr(
        slurm_queue,
        "call",
        lambda words, env=None: subprocess.CompletedProcess(words, 0, answers[words[0]], ""),
    )
    assert slurm.main(["train", "recipe.yaml", *SIZE]) == 0
    told = f"job 7 waits ({reason}): it may never start. Does its partition have what was asked for"
    assert (told in capsys.readouterr().err) == for_ever


def test_states_of_all_jobs_are_asked_for_at_once(says: Says) -> None:
    asked = says("7_0 RUNNING None\n7_1 PENDING Resources\n9 PENDING Nodes required are DOWN\n")
    assert slurm_queue.states_of(["7", "9"]) == {
        "7_0": "RUNNING",
        "7_1": "PENDING (Resources)",
        "9": "PENDING (Nodes required are DOWN)",
    }
    assert len(asked) == 1
    assert "--jobs=7,9" in asked[0]
    says("7_0 RUNNING None\n7_1 PENDING Resources\n")
    assert slurm_queue.describe(["7"]) == ["job 7_0: RUNNING", "job 7_1: PENDING (Resources)"]


def test_a_controller_that_does_not_answer_is_not_an_empty_queue(says: Says, run_dir: Path) -> None:
    slurm_queue.note(run_dir, job="7")
    says(stderr="slurm_load_jobs error: Invalid job id specified\n", code=1)
    slurm.refuse_a_second_job(run_dir)
    says(stderr="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    with pytest.raises(UserError, match="squeue: slurm_load_jobs error: Unable to contact"):
        slurm.refuse_a_second_job(run_dir)
    (told,) = [line for line in status.status(run_dir) if line.startswith("job 7: ")]
    assert told.startswith("job 7: not known here: squeue: slurm_load_jobs error: Unable")


def test_a_run_that_waits_in_the_queue_can_be_stopped(
    says: Says, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm_queue.note(run_dir, job="7")
    says("7 PENDING BeginTime\n")
    assert cli.main(["stop", str(run_dir)]) == 0
    told = f"{run_dir} will not start: `launch/slurm.py cancel {run_dir}` ends job 7\n"
    assert told in capsys.readouterr().out
    assert (run_dir / "STOP").exists()


def test_the_status_of_a_sweep_is_that_of_its_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axis = "--sweep=data.template=alpaca,chat/ml.jinja"
    (here / "chat").mkdir()
    (here / "chat/ml.jinja").write_text("")
    assert slurm.main(["train", "recipe.yaml", *SIZE, axis, "--prepare"]) == 0
    assert cli.main(["status", "runs/my run"]) == 0
    told = capsys.readouterr().out
    for name in ("alpaca", "chat_ml.jinja"):
        assert f"runs/my run/data.template={name}: launched by slurm, nodes: 2" in told
    folders = [Path(f"runs/my run/data.template={name}") for name in ("alpaca", "chat_ml.jinja")]
    assert slurm_queue.runs_of(Path("runs/my run")) == folders


# ---- what a batch script asks ----------------------------------------------------------------


@pytest.fixture
def run_dir(here: Path) -> Path:
    """Prepare a run folder."""
    options = ["--restarts=1", "--exclude-bad-nodes", "--prepare"]
    assert slurm.main(["train", "recipe.yaml", *SIZE, *options]) == 0
    return here / "runs/my run"


def job(restart: int = 0, number: int = 7, hosts: str = "n1 n2") -> Job:
    environment = {"SLURM_JOB_ID": str(number), "DIST_SFT_HOSTS": hosts}
    if restart:
        environment["SLURM_RESTART_COUNT"] = str(restart)
    return Job.me(environment)


RUNS, ENDED, MUTE = Fate(goes_on=True), Fate(goes_on=False), Fate(goes_on=None)
PREEMPTED = Fate(goes_on=True, preempted=True)
TIMED_OUT = Fate(goes_on=False, timed_out=True)


def ended(
    run_dir: Path, attempt: int, code: int, reason: str = "so it was", by: str | None = None
) -> None:
    runs.write_outcome(run_dir, attempt, Outcome(code, reason, 3, by))
    (run_dir / lease.NAME).unlink(missing_ok=True)


def saved(run_dir: Path, attempt: int) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"attempt": attempt, "step": 3, "event": "checkpoint"}) + "\n")


USR1, TERM, STOP = "signal SIGUSR1", "signal SIGTERM", "STOP file"


@pytest.mark.parametrize(
    ("code", "by", "asked", "fate", "decision"),
    [
        (runs.FINISHED, None, "", RUNS, "exit 0"),
        (runs.FINISHED, None, "USR1", RUNS, "exit 0"),
        (runs.FINISHED, None, "TERM", ENDED, "exit 0"),
        (runs.STOPPED, USR1, "USR1", RUNS, "requeue"),
        (runs.STOPPED, USR1, "", RUNS, "requeue"),
        (runs.STOPPED, USR1, "USR1", MUTE, "requeue"),
        (runs.STOPPED, TERM, "", PREEMPTED, "requeue"),
        (runs.STOPPED, TERM, "", RUNS, "exit 75"),
        (runs.STOPPED, TERM, "", MUTE, "wait"),
        (runs.STOPPED, TERM, "TERM", RUNS, "exit 75"),
        (runs.STOPPED, TERM, "TERM", ENDED, "wait"),
        (runs.STOPPED, TERM, "TERM", MUTE, "wait"),
        (runs.STOPPED, USR1, "USR1", ENDED, "wait"),
        (runs.STOPPED, TERM, "TERM", TIMED_OUT, "requeue"),
        (runs.STOPPED, STOP, "", RUNS, "exit 75"),
        (runs.STOPPED, STOP, "", MUTE, "exit 75"),
        (runs.FAILED, None, "", RUNS, "requeue"),
        (runs.FAILED, None, "", MUTE, "requeue"),
        (runs.FAILED, None, "USR1", RUNS, "requeue"),
        (runs.FAILED, None, "TERM", RUNS, "exit 1"),
        (runs.FAILED, None, "TERM", ENDED, "wait"),
        (runs.FAILED, None, "TERM", TIMED_OUT, "requeue"),
        (runs.WRONG_INPUT, None, "", RUNS, "exit 2"),
    ],
)
def test_what_becomes_of_a_job(
    run_dir: Path, code: int, by: str | None, asked: str, fate: Fate, decision: str
) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    ended(run_dir, 0, code, by=by)
    assert batch_job.end(run_dir, 0, asked, fate) == decision


@pytest.mark.parametrize(
    ("text", "fate"),
    [
        ("JobId=7 JobState=RUNNING Reason=None PreemptTime=None A=b c", RUNS),
        ("JobId=7 JobState=SUSPENDED Reason=None", RUNS),
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-25T00:02:09", PREEMPTED),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0 PreemptTime=None", TIMED_OUT),
        ("JobState=COMPLETING Reason=None Restarts=1", ENDED),
        ("", MUTE),
    ],
)
def test_what_slurm_has_in_mind(text: str, fate: Fate) -> None:
    """As scontrol of SLURM 22.05 said it."""
    assert Fate.parse(text) == fate


def test_an_attempt_that_said_nothing_is_repeated(run_dir: Path) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    assert batch_job.end(run_dir, 0, "", RUNS) == "requeue"


def test_a_stop_is_never_put_back(run_dir: Path, says: Says) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    (run_dir / "STOP").touch()
    ended(run_dir, 0, runs.STOPPED)
    assert batch_job.end(run_dir, 0, "USR1", RUNS) == "exit 75"
    for again in (job(restart=1), job(number=8)):
        with pytest.raises(
            UserError, match=r"STOP asks this run to stop; `launch/slurm\.py resume"
        ):
            batch_job.begin(run_dir, again)
    says()
    assert slurm.main(["train", "recipe.yaml", *SIZE, "--prepare"]) == 0
    assert batch_job.begin(run_dir, job(number=8)) == 1, "a person prepared it again"


def test_a_preempted_attempt_is_not_in_vain(run_dir: Path) -> None:
    for attempt in range(4):
        assert batch_job.begin(run_dir, job(restart=attempt)) == attempt
        ended(run_dir, attempt, runs.STOPPED, "before the workers could save", by=USR1)
        assert batch_job.end(run_dir, attempt, "USR1", PREEMPTED) == "requeue"
    for attempt, decision in ((4, "requeue"), (5, "exit 75")):
        assert batch_job.begin(run_dir, job(restart=attempt)) == attempt
        ended(run_dir, attempt, runs.STOPPED, "before the workers could save", by=USR1)
        assert batch_job.end(run_dir, attempt, "USR1", RUNS) == decision


def test_a_task_of_an_array_has_a_number_of_its_own(run_dir: Path) -> None:
    """Somebody submitted it by sbatch: status and cancel know it all the same."""
    environment = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    assert batch_job.begin(run_dir, Job.me(environment)) == 0
    assert slurm_queue.jobs_of(run_dir) == ["7_0"]


def test_a_job_of_several_kinds_of_nodes_is_refused() -> None:
    with pytest.raises(UserError, match="heterogeneous jobs"):
        Job.me({"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2"})


def test_too_many_attempts_in_vain(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    ended(run_dir, 0, runs.FAILED)
    assert batch_job.end(run_dir, 0, "", RUNS) == "requeue"
    assert batch_job.begin(run_dir, job(restart=1)) == 1
    saved(run_dir, 1)
    ended(run_dir, 1, runs.FAILED)
    assert batch_job.end(run_dir, 1, "", RUNS) == "requeue"
    for attempt in (2, 3):
        assert batch_job.begin(run_dir, job(restart=attempt)) == attempt
        ended(run_dir, attempt, runs.FAILED, "the loss is nan")
        decision = batch_job.end(run_dir, attempt, "", RUNS)
    assert decision == "exit 1"
    told = (
        "gave up: 2 attempts of job 7 in a row brought no new checkpoint (--restarts: 1). "
        "The last one: the loss is nan"
    )
    assert told in capsys.readouterr().err
    with pytest.raises(UserError, match="gave up: 2 attempts of job 7"):
        batch_job.begin(run_dir, job(restart=4))  # as when its node died
    assert batch_job.begin(run_dir, job(number=8)) == 4, "a person submitted it again"


def test_parts_are_progress_as_checkpoints_are(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump(generation()))
    size = [*SIZE, "--restarts=0", "--prepare"]
    assert slurm.main(["generate", "recipe.yaml", *size]) == 0
    run_dir = here / "runs/my run"
    for attempt, decision in ((0, "requeue"), (1, "exit 1")):
        assert batch_job.begin(run_dir, job(restart=attempt)) == attempt
        if attempt == 0:
            (runs.attempt_dir(run_dir, 0) / runs.FRUITFUL).touch()
        ended(run_dir, attempt, runs.FAILED)
        assert batch_job.end(run_dir, attempt, "", RUNS) == decision
    told = "gave up: 1 attempts of job 7 in a row brought no new part (--restarts: 0). "
    assert told in capsys.readouterr().err


def test_the_nodes_that_there_are_count(run_dir: Path) -> None:
    assert batch_job.begin(run_dir, job(hosts="n3")) == 0
    assert runs.read_launch(run_dir).nodes == 1
    assert batch_job.read(run_dir, 0) == Job("7", 0, ["n3"])
    (line,) = (run_dir / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["nodes"] == "2 -> 1"


def test_bad_nodes_are_kept_out(run_dir: Path) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    verdict = {"nodes": [], "problems": ["n2: so and so"], "bad": ["n2"]}
    (runs.attempt_dir(run_dir, 0) / "roll_call.json").write_text(json.dumps(verdict))
    ended(run_dir, 0, runs.FAILED)
    assert batch_job.end(run_dir, 0, "", RUNS) == "requeue n2"
    launch = runs.read_launch(run_dir)
    launch.options["exclude_bad_nodes"] = False
    runs.write_launch(run_dir, launch)
    assert batch_job.end(run_dir, 0, "", RUNS) == "requeue"


def test_a_finished_run_is_not_begun(run_dir: Path) -> None:
    assert batch_job.begin(run_dir, job()) == 0
    ended(run_dir, 0, runs.FINISHED)
    assert batch_job.begin(run_dir, job(restart=1)) is None
    assert runs.attempts(run_dir) == [0]


def test_a_run_in_use_is_not_begun(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    with lease.hold(run_dir, 0), pytest.raises(UserError, match="is in use by"):
        batch_job.begin(run_dir, job())


def test_a_launch_is_what_a_resume_repeats(run_dir: Path) -> None:
    told = asdict(runs.read_launch(run_dir))
    assert told["launcher"] == "slurm"
    assert (told["nodes"], told["workers_per_node"]) == (2, 8)
    command = slurm.command_for(run_dir, "train", told["options"])
    assert "--signal=B:USR1@300" in command
    assert command[-1] == str(run_dir)
