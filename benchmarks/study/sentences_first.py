"""What docs/study_first.md says in numbers outside its tables: each piece of a sentence, worked out from the runs, and
the set-up that stands in the scripts of commit 114aca1. The page's other sentences have no digits."""

import numpy as np
from pages import is_percent, shown_difference, shown_p
from report_first import (
    ABLATION_COLUMNS,
    DATA,
    GKD_MEASURES,
    OTHERS,
    OTHERS_COLUMNS,
    first_warning,
    gkd_tests,
    is_ruined,
    modes_settings,
    priming_differences,
    random_runs,
    warning_groups,
)
from runs_first import (
    REAL_NAMES,
    WARNING,
    Results,
    at,
    both_shares,
    difference,
    gain_share,
    starts_from_text,
    value,
    values,
)
from study_statistics import Difference

from trl_promptkd.intervals import holm


# Of the set-up: run.py, methods.py, measure.py, models.py, world.py and real_model.py at 114aca1
SET_UP = [
    "the scripts of commit `114aca1`",
    "the first of them with `7314e98`",
    "every number below 100",
    "70, 15 and 15 %",
    "three times in ten (0.3)",
    "1.0 M parameters",
    "73,000 parameters",
    "1,500 steps of SFT on 800 problems",
    "800 problems again and again",
    "batches of 16",
    "200 steps",
    "300 steps",
    "30 seconds of one core",
    "after 100 of its 200 steps",
    "a share of 15 %",
    "fewer than 6 tokens",
    "1,000 test problems, all else on 250",
    "95 % intervals",
    "p is below 0.05",
    "80 % probability",
    "400 steps of SFT",
    "1,000 steps with the forward KL",
    "learning rate of 0.01",
    "15 of its 30 layers",
    "81 M parameters",
    "24 steps of 8 rows",
    "384 rows of Dolly",
    "1e-4",
    "48 tokens",
    "64 tokens",
    "32 rows",
    "seeds 10 and 20",
    "warned at 0.3",
    "threshold at log 14",  # what the page said before
    "on the 800 problems",
    "In 30 seconds",
    "below 0.05 after",
    "SmolLM2-135M-Instruct",
    "*ann has 27 apples . then ann buys 15 . then ann loses 8 . how many apples ?*",
    "(*27 + 15 = 42 . 42 - 8 = 34 . so 34*)",
    "(*so 34*)",
]


def mean(runs: list[dict], when: str, measure: str) -> str:
    """Of a measure in percent with one digit, of another one as in the tables."""
    digits = 1 if is_percent(measure) else 2 if measure.endswith("_answer") else 3
    return f"{np.mean(values(runs, when, measure)):.{digits}f}"


def span(some: list[float], digits: int = 1) -> str:
    return f"{min(some):.{digits}f} to {max(some):.{digits}f}"


def both(results: Results, name: str, when: str, measure: str) -> str:
    return " and ".join(mean(results[data][name], when, measure) for data in DATA)


def both_p(found: Difference, corrected: float) -> str:
    return f"(p {shown_p(found.p)}, after Holm {shown_p(corrected)})"


def of_gkd(results: Results) -> list[str]:
    tests = gkd_tests(results)
    greedy = {data: tests["accuracy", data, "steps"] for data in DATA}
    per_token, per_answer = (tests[measure, "fresh", "steps"] for measure in ("reverse_kl", "reverse_kl_answer"))
    slower, forward = tests["reverse_kl_answer", "finite", "time"], tests["forward_kl", "fresh", "time"]
    kept = [key for key, (_, p, _) in tests.items() if p < 0.05]
    assert [measure for measure, *_ in kept] == ["brief_share"] * 4
    quality = [(key, found) for key, (found, _, _) in tests.items() if key[0] != "brief_share" and found.p < 0.05]
    assert {key for key, _ in quality} == {
        ("reverse_kl", "fresh", "steps"),
        ("reverse_kl_answer", "finite", "time"),
        ("forward_kl", "fresh", "time"),
    }
    seconds = [
        np.mean(values(results[d]["PromptKD"], "steps", "seconds"))
        / np.mean(values(results[d]["GKD"], "steps", "seconds"))
        for d in DATA
    ]
    seen = [seen for (measure, _, _), (_, _, seen) in tests.items() if measure in ("accuracy", "sampled_accuracy")]
    return [
        f"of the {len(tests)} tests between them",
        f"by {' and '.join(shown_difference(found, 'accuracy') for found, _, _ in greedy.values())} points",
        f"{per_token[0].mean:.3f} ± {per_token[0].half:.3f} nats per token",
        f"{per_answer[0].mean:.2f} ± {per_answer[0].half:.2f} nats per answer",
        f"p is {shown_p(per_token[0].p)} there, and {shown_p(per_token[1])} after Holm's correction",
        f"{shown_difference(slower[0], 'reverse_kl_answer')} nats per answer on the 800 problems "
        f"{both_p(*slower[:2])}",
        f"{shown_difference(forward[0], 'forward_kl')} nats per token on fresh ones {both_p(*forward[:2])}",
        f"differences of {span(seen)} points of accuracy",
        f"{seconds[0]:.1f} and {seconds[1]:.1f} times GKD's seconds",
        f"{len(GKD_MEASURES)} measures",
    ]


def of_modes(results: Results) -> list[str]:
    text = [
        run
        for run in results.promptkd()
        if run["group"] != "tune" and run["settings"]["warm_steps"] == 1500 and starts_from_text(run)
    ]
    largest = max(value(entry, "brief_share") for run in text for entry in run["measures"][1:])
    gkd = [at(run, w, "brief_share") for data in DATA for run in results[data]["GKD"] for w in ("steps", "time")]
    paper, fresh = (modes_settings(results)[name] for name in ("paper", "paper, fresh problems"))
    students = [at(run, "start", "brief_share") for run in paper]
    return [
        f"all {len(text)} runs",
        f"at most {largest:.1f} % of their samples",
        f"{span(gkd)} %",
        f"{span(students)} % when they start",
        f"{mean(paper, 'start', 'prompted_forward_kl')} nats per token before the first step",
        f"{mean(paper, 'end', 'prompted_forward_kl')} and {mean(fresh, 'end', 'prompted_forward_kl')} in the end",
        f"{mean(paper, 'end', 'prompted_plain')} nats per token, "
        f"{mean(paper, 'end', 'prompted_plain_answer')} per answer",
        f"KL(pP || p) = log(1 / 0.85) = {np.log(1 / 0.85):.2f} nats per answer",
    ]


def of_methods(results: Results) -> list[str]:
    wins = [
        at(other, "time", "accuracy") > at(run, "time", "accuracy")
        for data in DATA
        for run, other in zip(results[data]["PromptKD"], results[data]["SeqKD"], strict=True)
    ]
    assert wins == [True] * 10
    keys = [(data, o, when, c) for data in DATA for o in OTHERS for when in ("steps", "time") for c in OTHERS_COLUMNS]
    p = holm([difference(results[data]["PromptKD"], results[data][o], when, c).p for data, o, when, c in keys])
    kept = [key for key, one in zip(keys, p, strict=True) if one < 0.05]
    assert kept == [("finite", "SeqKD", "time", "forward_kl")]
    behind = [-difference(results[data]["PromptKD"], results[data]["SeqKD"], "time", "accuracy").mean for data in DATA]
    start = results["finite"]["PromptKD"]
    brought = [both(results, name, "steps", "reverse_kl_answer") for name in ("GKD", "PromptKD")]
    return [
        f"{both(results, 'SeqKD', 'time', 'accuracy')} % of the problems",
        f"SFT {both(results, 'SFT', 'time', 'accuracy')} %",
        f"GKD {both(results, 'GKD', 'time', 'accuracy')} %",
        f"PromptKD {both(results, 'PromptKD', 'time', 'accuracy')} %",
        f"{behind[0]:.1f} and {behind[1]:.1f} points ahead of PromptKD",
        f"{len(keys)} tests",
        f"the smallest p has to be below {0.05 / len(keys):.4f}",
        f"KL(p || q) of {both(results, 'SeqKD', 'time', 'forward_kl')} nats per token, with "
        f"{mean(start, 'start', 'forward_kl')} at the start",
        f"from {mean(start, 'start', 'reverse_kl_answer')} nats per answer to {brought[0]} with GKD "
        f"and {brought[1]} with PromptKD",
        f"solve {span(values(start, 'start', 'accuracy'))} % of the problems",
        *learning_rates(results),
    ]


def learning_rates(results: Results) -> list[str]:
    """Those with the best accuracy on the validation split, which all other runs have."""
    best = {
        name: max(runs, key=lambda run: at(run, "end", "accuracy"))["settings"]["learning_rate"]
        for name, runs in results["tune"].items()
    }
    low = {name for name, rate in best.items() if rate == 0.001}
    assert low == {"KD, reverse", "GKD", "PromptKD"}
    assert {best[name] for name in best.keys() - low} == {0.003}
    rates = sorted({run["settings"]["learning_rate"] for runs in results["tune"].values() for run in runs})
    return [
        f"0.001 for GKD, PromptKD and reverse KD and 0.003 for the others, of {', '.join(f'{r:g}' for r in rates)}"
    ]


def of_following(results: Results) -> list[str]:
    paper = [run for data in DATA for run in results[data]["PromptKD"]]
    weak = [run for run in paper if at(run, "start", "accuracy") < 10]
    strong = [run for run in paper if at(run, "start", "accuracy") > 30]
    moved = [at(run, "end", "prompted_plain") / at(run, "end", "reverse_kl") for run in weak]
    settings = [runs for name, runs in modes_settings(results).items() if "forward" not in name]
    same = [run for runs in settings for run in runs if starts_from_text(run)]
    r = np.corrcoef(values(same, "start", "accuracy"), list(map(gain_share, same)))[0, 1]
    turned = list(map(gain_share, results["ablations"]["forward prompt loss"]))
    careful = [
        gain_share(run) for run in results["ablations"]["init careful text"] if at(run, "start", "accuracy") < 10
    ]
    grid = results["grid"]
    short = [name for name in grid if name.endswith("short") and "GKD" not in name]
    full = [name for name in grid if name.endswith("full") and "GKD" not in name]
    starts = values(grid["GKD, full"], "start", "accuracy")
    assert sorted(starts) == sorted(values(results["finite"]["PromptKD"], "start", "accuracy"))[-2:]
    token = {name: np.mean(values(runs, "end", "reverse_kl")) for name, runs in grid.items()}
    answer = {name: np.mean(values(runs, "end", "reverse_kl_answer")) for name, runs in grid.items()}
    return [
        f"{100 * min(map(gain_share, weak)):.0f} to {100 * max(map(gain_share, weak)):.0f} %",
        f"with the two strongest {span([100 * gain_share(run) for run in strong])} %",
        f"r = {r:.2f} over the {len(same)} runs",
        f"{span([100 * share for share in moved])} % of KL(q || p)",
        f"{span([100 * share for share in turned])} % with every student",
        f"{span([100 * share for share in careful])} % with the two weak students",
        f"{' and '.join(f'{one:.1f}' for one in starts)} % right at the start",
        f"{span([token[name] for name in short], 2)} nats per token with PromptKD and {token['GKD, short']:.2f} with "
        "GKD",
        f"{span([answer[name] for name in short])} and {answer['GKD, short']:.1f} nats per answer",
        f"{span([answer[name] for name in full])} nats per answer, GKD {answer['GKD, full']:.1f}",
    ]


def of_settings(results: Results) -> list[str]:
    paper = results["ablations"]["paper"]
    names = [name for name in results["ablations"] if name != "paper"]
    p = [difference(results["ablations"][name], paper, "end", c).p for name in names for c in ABLATION_COLUMNS]
    assert min(p) > 0.02
    ruined = [run for run in random_runs(results) if is_ruined(run)]
    alone = [at(run, "end", "brief_share") for run in ruined if at(run, "end", "brief_share") > 90]
    (mixed,) = [at(run, "end", "brief_share") for run in ruined if at(run, "end", "brief_share") < 90]
    assert (len(ruined), len(alone)) == (4, 3)
    back = [run for run in random_runs(results) if not is_ruined(run)]
    return [
        f"The smallest of {len(p)} p values is {min(p):.3f}, and {min(holm(p)):.2f} after Holm's correction",
        f"{span(alone)} % of their samples, the fourth {mixed:.1f} %",
        f"{span(values(ruined, 'end', 'accuracy'))} % right",
        f"KL(p || pP) is {span(values(ruined, 'end', 'prompted_forward_kl'), 2)} nats per token in these four",
        f"and {span(values(back, 'end', 'prompted_forward_kl'), 3)} in the other six",
    ]


def of_warning(results: Results, real: dict) -> list[str]:
    groups = warning_groups(results, real)
    fine = [shares for kind, runs in groups.items() for shares in runs if max(shares[1:]) < WARNING]
    largest = max(max(shares[1:]) for shares in fine)
    weak = [run for data in DATA for run in results[data]["PromptKD"] if at(run, "start", "accuracy") < 10]
    (collapse,) = [run for run in results.promptkd() if run["settings"]["learning_rate"] == 0.01]
    assert sum(map(len, groups.values())) - len(fine) == 6
    fast = both_shares(real["promptkd_lr1e-2"]["log"])
    return [
        f"at most {largest:.2f} in the {len(fine)} others",
        f"at log {first_warning(fast)} of {len(fast)}",
        f"at most {max(max(both_shares(run['log'])[1:]) for run in weak):.2f} in the runs of the two weak students",
        f"{at(collapse, 'end', 'brief_share'):.1f} % of its samples",
    ]


def of_priming(results: Results) -> list[str]:
    found = {key: dict(some) for key, some in priming_differences(results).items()}
    every = [(key, measure, one) for key, some in found.items() for measure, one in some.items()]
    corrected = dict(
        zip([(key, measure) for key, measure, _ in every], holm([one.p for *_, one in every]), strict=True)
    )
    careful, pupil = ("careful", "teacher"), ("pupil", "teacher")
    kept = {measure for (_, measure), p in corrected.items() if p < 0.05}
    assert kept == {"forward_kl", "brief_share"}
    assert sum(p < 0.05 for p in corrected.values()) == 8
    teacher = {name.split(":")[0]: run for name, (run,) in results["teacher"].items()}
    assert teacher["no line"]["accuracy"] == 1
    sampled = {line: 100 * run["sampled_accuracy"] for line, run in teacher.items()}
    with_line = [run for name, runs in results["priming"].items() if "no line" not in name for run in runs]
    primed = {name: mean(runs, "end", "sampled_accuracy") for name, runs in results["priming"].items()}
    greedy = {name: mean(runs, "end", "accuracy") for name, runs in results["priming"].items()}
    return [
        f"all test problems greedily, and {sampled['no line']:.1f} % if it samples",
        f"right in {sampled['careful']:.1f} % instead of {sampled['no line']:.1f} %",
        f"the pupil's line in {sampled['pupil']:.1f} %",
        f"{primed['careful, teacher']} % of the student's samples are right, "
        f"without it {primed['no line, teacher']} %",
        *(
            f"{shown_difference(found[key][c], c)} points {both_p(found[key][c], corrected[key, c])}"
            for key, c in ((careful, "sampled_accuracy"), (pupil, "accuracy"))
        ),
        f"{greedy['pupil, teacher']} % of the problems greedily",
        f"{len(every)} tests",
        f"at most {max(values(with_line, 'end', 'brief_share')):.1f} % in any run",
        f"{mean(results['priming']['no line, teacher'], 'end', 'brief_share')} % without a line",
    ]


def of_real(real: dict) -> list[str]:
    rouge = {
        name: [real[name][r][s]["mean"]["rougeL"] for r in ("gold", "teacher") for s in real["warm"]["gold"]]
        for name in REAL_NAMES
        if name != "teacher"
    }
    falls = np.subtract(rouge["promptkd"], rouge["promptkd_lr1e-3"])
    assert (falls > 0).tolist() == [True] * 6
    assert rouge["promptkd_lr1e-2"] == np.min(list(rouge.values()), axis=0).tolist()
    start, sft, gkd, paper = (real[name] for name in ("warm", "sft", "gkd", "promptkd"))
    ten, hundred = real["promptkd_lr1e-3"], real["promptkd_lr1e-2"]
    token = [f"{run['reverse_kl']:.2f}" for run in (gkd, paper, sft, start)]
    answer = [f"{value(run, 'reverse_kl_answer'):.1f}" for run in (gkd, paper, sft, start)]
    gains = [f"{run['reverse_kl'] - run['reverse_kl_prompted']:.2f}" for run in (paper, ten)]
    return [
        f"KL(q || p) per token is {token[0]} with GKD and {token[1]} with PromptKD, "
        f"{token[2]} with SFT and {token[3]} at the start",
        f"Per answer it is {', '.join(answer[:3])} and {answer[3]}",
        f"{gkd['mean_length']:.1f} and {paper['mean_length']:.1f} tokens long, {start['mean_length']:.1f} at the "
        "start",
        f"{paper['cpu_seconds'] / gkd['cpu_seconds']:.2f} times GKD's",
        f"by {span(falls)} points",
        f"from {gains[0]} to {gains[1]} nats per token",
        f"KL(q || pP) is {hundred['reverse_kl_prompted']:.2f} where PromptKD's is {paper['reverse_kl_prompted']:.2f}",
        f"KL(p || q) is {hundred['forward_kl']:.2f} nats per token, {start['forward_kl']:.2f} at the start",
        f"entropy of {hundred['student_entropy']:.1f} nats, {start['student_entropy']:.1f} at the start",
    ]


def sentences(results: Results, real: dict) -> list[str]:
    lines = sum(len(runs) for group in results.groups.values() for runs in group.values())
    trained = lines - len(results["ablations"]["paper"]) - len(results["teacher"])
    return [
        f"{trained} runs in the small world",
        *of_gkd(results),
        *of_modes(results),
        *of_methods(results),
        *of_following(results),
        *of_settings(results),
        *of_warning(results, real),
        *of_priming(results),
        *of_real(real),
    ]


def known(results: Results, real: dict) -> list[str]:
    """All that accounts for a number."""
    return [*sentences(results, real), *SET_UP]
