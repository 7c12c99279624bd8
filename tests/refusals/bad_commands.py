"""Command lines."""

from bad_models import LORA, spoiled
from case import ANSWERED_ROW, command, saved, soft_prompt, written
from peft import get_peft_model
from tiny import WORDS, tiny_model, tiny_tokenizer


ATTENTION = "analyze attention --output_dir out --dataset rows.jsonl --model"
PROMPT = "analyze prompt --output_dir out --prompt run --teacher teacher"
EXPOSURE = "analyze exposure --model student --dataset rows.jsonl"
BUILD = "cache build --teacher no/such-teacher --output_dir cache --dataset rows.jsonl"
BUILD_HERE = BUILD.replace("no/such-teacher", "teacher")
EVAL = "eval instruct --model student --dataset"
RANK = "rank-priming --model teacher --dataset rows.jsonl"


def other_tokenizer():
    tiny_tokenizer(WORDS[::-1]).save_pretrained("teacher")


def long_rows():
    written("rows.jsonl", ANSWERED_ROW.replace("sat", "sat " * 200))
    saved(tiny_model("gpt2"), "student")


def lora_adapter():
    get_peft_model(tiny_model(), LORA).save_pretrained("run")


def prompts_of_two_runs():
    for step, size in ((1, 3), (2, 7)):
        soft_prompt(size).save_adapter(f"two_runs/checkpoint-{step}/teacher_prompt")


def prompt_for(teacher):
    def prepare():
        soft_prompt().save_adapter("run/teacher_prompt")
        saved(teacher)

    return prepare


def texts(content, name="texts.yaml"):
    def prepare():
        written("rows.jsonl", 2 * ANSWERED_ROW)
        written(name, content)

    return prepare


def recipe_of_several():
    written("recipe.yaml", "{priming: teacher, teacher_model_name_or_path: {math: a/teacher, code: null}}")


CASES = [
    command(
        "doctor --model student --dataset rows.jsonl --config recipe.yaml",
        "several teachers ('math', 'code') | Pass the one to look at by `--teacher`",
        recipe_of_several,
    ),
    command("cache build --output_dir cache", "arguments are required | --teacher, --dataset"),
    command(BUILD, "`--teacher` is 'no/such-teacher': there is no such folder | Check the name"),
    command(
        "doctor --model nope --dataset rows.jsonl", "`--model` is 'nope': there is no such folder | Check the name"
    ),
    command(
        "doctor --model student --teacher nope --dataset rows.jsonl",
        "`--teacher` is 'nope': there is no such folder | Check the name",
    ),
    command(f"{BUILD} --priming teacher --priming_file x", "are both given | choose one"),
    command(f"{BUILD} --teacher_init_kwargs '{{dtype: float32}}'", "--teacher_init_kwargs | JSON of a dict, such as"),
    command(
        f"{BUILD} --prompt_column quest",
        "`prompt_column` is 'quest' | the columns are ['completion', 'prompt']",
    ),
    command(
        f"{BUILD_HERE} --backend server",
        "`backend` is 'server', but `teacher_server` is missing | Pass its address",
    ),
    command(
        f"{BUILD_HERE} --backend server --teacher_server http://a:8000 --response_source teacher",
        "`response_source` is 'teacher' | Let a server that generates write them first | `response_source='dataset'`",
    ),
    command(f"{BUILD_HERE} --part 3/2", "`part` is '3/2'; it must be a number and how many there are, such as '2/3'"),
    command("cache info student", "no manifest.json | Build one with"),
    command(f"{ATTENTION} student --prompt teacher_prompt", "`--prompt` is 'teacher_prompt' | Pass `--teacher`, too"),
    command(f"{ATTENTION} student teacher student/", "'student' is given twice in `--model` | Give each once"),
    command(
        f"{ATTENTION.replace('rows', 'prompts')} student",
        "`--dataset` holds prompts without answers | pass `--queries all`",
    ),
    command(
        f"{ATTENTION} student teacher",
        "id 6, which is 'suppose' | Choose two models of one family",
        other_tokenizer,
    ),
    command(f"{ATTENTION} student", "128 positions | 203 | Lower `--max_length`", long_rows, needs_weights=True),
    command(f"{EXPOSURE} --teacher teacher --rows 0", "--rows: '0' is not allowed | 1 or more"),
    command(f"{EXPOSURE} --teacher no/such-teacher", "`--teacher` is 'no/such-teacher': there is no such folder"),
    command(
        f"{EXPOSURE} --teacher teacher --model nope", "`--model` is 'nope': there is no such folder | Check the name"
    ),
    command(f"{ATTENTION} student --teacher nope", "`--teacher` is 'nope': there is no such folder | Check the name"),
    command(f"{EXPOSURE} --teacher teacher --prompt student", "holds no soft prompt | Pass the folder"),
    command(
        f"{PROMPT} --responses student",
        "there is no `--model` | Pass one, or set `--responses dataset`",
    ),
    command(f"{PROMPT} --responses student --model student", "there is no `--dataset` | Pass one"),
    command(f"{PROMPT} --dataset prompts.jsonl", "`--dataset` holds prompts without answers | `--responses student`"),
    command(
        f"{PROMPT} --dataset prompts.jsonl --max_length 1 --responses student --model student",
        "1 of 1 prompts in `--dataset` do not fit into `max_length=1` | Set `max_length` to at least",
    ),
    command(PROMPT, "holds a LORA adapter | Pass the folder of a soft prompt", lora_adapter),
    command(
        PROMPT.replace("run", "two_runs"),
        "(7, 32) and (3, 32) | Pass the folder of one run",
        prompts_of_two_runs,
    ),
    command(
        f"{PROMPT} --dataset rows.jsonl",
        "32 numbers a token | 64 | Pass the teacher that it was trained with",
        prompt_for(tiny_model(hidden_size=64)),
        needs_weights=True,
    ),
    command(
        f"{PROMPT} --dataset prompts.jsonl --responses student --model teacher",
        "hold NaN or infinities | Check its weights",
        prompt_for(spoiled(tiny_model())),
        needs_weights=True,
    ),
    command(f"{RANK} --texts none.txt", "none.txt, the file with the priming texts, does not exist | Check the path"),
    command(
        f"{RANK} --texts texts.jsonl",
        "`--texts` is 'texts.jsonl', which cannot be read | line 1 | Correct it",
        texts("{text}", "texts.jsonl"),
    ),
    command(f"{RANK} --texts texts.yaml", "holds no list of texts | Write a text a line", texts("text: red")),
    command(
        f"{RANK} --texts texts.yaml --rows 2",
        "which holds {'prompt': 'red'} | a mapping with `text` | Correct it",
        texts("[{prompt: red}]"),
    ),
    command(
        f"{RANK} --texts texts.txt --priming_placement system",
        "With the text 'red' (system): Row 0 of `dataset` | needs conversations | Use 'prefix'",
        texts("red", "texts.txt"),
    ),
    command(f"{RANK} --priming truth", "`priming` is 'truth'; the names are 'teacher', 'ground_truth'"),
    command(f"{RANK} --scorer bleu", "`--scorer` is 'bleu'; it must be 'gsm8k', 'exact_match', 'rougeL' | :function"),
    command(f"{RANK} --scorer no_such:f", "`--scorer` is 'no_such:f', which cannot be imported | Check its name"),
    command(f"{RANK} --rows 0", "`num_rows` is 0; it must be above 0"),
    command(RANK, "1 of 1 rows fit into `max_prompt_length=None` | two or more | Give more rows"),
    command(f"{EVAL} instructions.jsonl --greedy --seeds 1", "`--greedy` and `--seeds` [1] | Omit one of them"),
    command(f"{EVAL} rows.jsonl --dataset rows.jsonl", "is given twice in `--dataset` | Give each once"),
    command(
        "eval instruct --model nope --dataset instructions.jsonl",
        "`--model` is 'nope': there is no such folder | Check the name",
    ),
    command(
        f"{EVAL} no/rows --dataset_split test", "`--dataset` is 'no/rows': there is no such folder | Check the name"
    ),
    command(
        f"{EVAL} rows.txt", "`--dataset` is 'rows.txt', a file | .jsonl | Convert it", lambda: written("rows.txt", "x")
    ),
    command(f"{EVAL} openai/gsm8k", "`--dataset` is 'openai/gsm8k' | Pass `--dataset_split`"),
    command(f"{EVAL} instructions.jsonl --batch_size 0", "`batch_size` is 0 | above 0"),
    command(
        f"{EVAL} instructions.jsonl --prompt_column text",
        "`--prompt_column` is 'text'; the columns are ['instruction', 'output'] | Name one of them",
    ),
    command("report student", "holds no run | Pass the run's `output_dir` or a checkpoint"),
    command(f"{EVAL} none.jsonl", "none.jsonl' | Check the path"),
]
