import json
import threading

import pytest
from chat_server import ChatServer, asked, reversed_words
from datasets import load_dataset

from trl_promptkd.generation import server_answers, store
from trl_promptkd.generation.openai_server import OpenAIServer
from trl_promptkd.generation.server_answers import write_server_answers


SAMPLING = {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0}
REQUESTS = [{"messages": [{"role": "user", "content": f"red cat {number}"}]} for number in range(9)]
ANSWERS = [(f"{number} cat red", False) for number in range(9)]


@pytest.fixture
def write(server, tmp_path):
    def write(requests=REQUESTS, folder="answers", num_at_once=2, model="teacher", seed=1, url=None, **sampling):
        client = OpenAIServer(url or server.url, model, num_at_once)
        sampling = {**SAMPLING, **sampling}
        return write_server_answers(requests, str(tmp_path / folder), client, sampling, seed, num_at_once, "Answers")

    return write


class TestWriting:
    def test_requests_hold_what_the_row_and_the_settings_say(self, write, server):
        write([{"prompt": "the cat"}])
        ((path, body),) = server.requests
        assert path == "/v1/completions"
        assert 0 <= body.pop("seed") < 2**31
        assert body == {"model": "teacher", "prompt": "the cat", **SAMPLING}

    def test_answers_come_in_the_order_of_the_requests(self, write, server):
        """Many at once, of which the first are the slowest."""
        waiting = threading.Barrier(3)

        def answer(body):
            if asked(body).endswith(("0", "1", "2")):
                waiting.wait(timeout=5)  # three are under way at the same time
            return reversed_words(body)

        server.answer = answer
        assert write(num_at_once=3) == ANSWERS

    def test_equal_requests_are_answered_once(self, write, server):
        answers = write([*REQUESTS[:3], *REQUESTS[:2]])
        assert answers == [*ANSWERS[:3], *ANSWERS[:2]]
        assert len(server.requests) == 3

    def test_each_row_has_a_seed_of_its_own_whatever_rows_it_is_among(self, write, server):
        def seeds():
            found = {asked(body): body["seed"] for body in server.bodies}
            server.requests.clear()
            return found

        write(folder="a")
        first = seeds()
        assert len(set(first.values())) == 9
        write(REQUESTS[::-1][:4], folder="b")
        assert seeds().items() <= first.items()
        write(folder="c", seed=2)
        assert not set(seeds().values()) & set(first.values())

    def test_are_a_data_set(self, write, server, tmp_path):
        server.answer = lambda body: ("red ü", "length" if "messages" in body else "stop")
        assert write([REQUESTS[0], {"prompt": "the cat"}]) == [("red ü", True), ("red ü", False)]
        files = str(tmp_path / "answers" / "*.parquet")
        stored = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
        chat, text = sorted(stored, key=lambda row: row["finish_reason"])
        assert set(stored.column_names) == {"key", "prompt", "completion", "finish_reason", "settings"}
        assert json.loads(chat["prompt"]) == REQUESTS[0]["messages"]
        assert (text["prompt"], text["completion"], text["finish_reason"]) == ("the cat", "red ü", "stop")
        settings = json.loads(text["settings"])
        assert settings.keys() == {"model", "seed", *SAMPLING}
        assert settings.items() >= {"model": "teacher", **SAMPLING}.items()

    def test_half_a_character_is_replaced(self, write, server):
        server.answer = lambda body: "red \ud83d"
        assert write(REQUESTS[:1]) == [("red ?", False)]
        assert write(REQUESTS[:1]) == [("red ?", False)]


class TestResuming:
    def test_what_is_there_is_not_asked_for_again(self, write, server):
        assert write(REQUESTS[:4]) == ANSWERS[:4]
        assert write() == ANSWERS
        assert len(server.requests) == 9
        server.__exit__()
        assert write() == ANSWERS

    def test_where_the_server_is_does_not_count(self, write, server):
        write()
        with ChatServer() as other:
            assert write(url=other.url) == ANSWERS
            assert not other.requests

    @pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 6}, {"seed": 2}])
    def test_what_made_them_counts(self, write, server, change):
        server.models.append("other")
        write()
        write(**change)
        assert len(server.requests) == 18

    def test_a_killed_run_resumes_and_asks_nothing_twice(self, write, server, monkeypatch):
        monkeypatch.setattr(store, "SECONDS_A_PART", 0.0)
        monkeypatch.setattr(server_answers, "_BATCHES", 1)
        original = server_answers.write_part

        def die(*args):
            original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(server_answers, "write_part", die)
            for _ in range(5):
                with pytest.raises(KeyboardInterrupt):
                    write()
        assert write() == ANSWERS
        assert sorted(map(asked, server.bodies)) == sorted(map(asked, REQUESTS))

    def test_a_server_that_breaks_off_leaves_what_it_has_answered(self, write, server):
        """Also what was not on the disk yet, and the rest of the batch that failed."""

        def answer(body):
            return ("", "content_filter") if asked(body).endswith("8") else reversed_words(body)

        server.answer = answer
        with pytest.raises(ValueError, match="content_filter"):
            write(num_at_once=1)
        refused = [body for body in server.bodies if asked(body).endswith("8")]
        first, server.answer = len(server.requests) - len(refused), reversed_words
        server.requests.clear()
        assert write(num_at_once=1) == ANSWERS
        assert first > 0
        assert len(server.requests) == 9 - first

    def test_a_connection_that_ends_for_good_is_an_error(self, write, server):
        server.faults.extend([None] * 99)
        with pytest.raises(ConnectionError, match="did not answer"):
            write(REQUESTS[:1])

    @pytest.mark.parametrize("damage", ["bytes", "reason"])
    def test_a_damaged_file_is_named(self, write, server, tmp_path, damage):
        write()
        (path,) = (tmp_path / "answers").iterdir()
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:-9])
        else:
            row = {"prompt": "a", "completion": "b", "finish_reason": "tired", "settings": "{}"}
            store.write_part(str(tmp_path / "answers"), "api", {"k": row}, server_answers._ANSWERS)
        with pytest.raises(ValueError, match=r"api-\w+\.parquet is damaged.*Delete it and start again"):
            write()
