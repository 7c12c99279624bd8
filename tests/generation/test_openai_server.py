import logging
import time
from email.utils import formatdate

import pytest

from trl_promptkd.generation import openai_server
from trl_promptkd.generation.openai_server import KEY_VARIABLE, OpenAIServer


CHAT = {"messages": [{"role": "user", "content": "the cat sat"}], "max_tokens": 5}
TEXT = {"prompt": "the cat sat", "max_tokens": 5}


class TestRequests:
    def test_messages_and_texts_go_to_their_own_addresses_as_they_are(self, server):
        client = OpenAIServer(server.url, "teacher")
        assert client.complete(CHAT) == ("sat cat the", "stop")
        assert client.complete(TEXT) == (" sat cat the", "stop")
        assert server.requests == [
            ("/v1/chat/completions", {"model": "teacher", **CHAT}),
            ("/v1/completions", {"model": "teacher", **TEXT}),
        ]

    def test_a_url_without_a_path_gets_v1(self, server):
        for url in (server.host, f"{server.host}/", f"{server.url}/"):
            assert OpenAIServer(url).url == server.url

    def test_the_only_model_is_taken(self, server):
        assert OpenAIServer(server.url).model == "teacher"

    @pytest.mark.parametrize(("models", "listed"), [([], "none"), (["a", "b"], "'a', 'b'")])
    def test_none_or_several_models_are_refused_by_their_names(self, server, models, listed):
        server.models = models
        with pytest.raises(ValueError, match=rf"it lists {listed}\. Set `teacher_answers_model`"):
            OpenAIServer(server.url)

    def test_an_answer_that_is_cut_and_one_of_thoughts_only(self, server):
        server.answer = lambda body: (None, "length")
        assert OpenAIServer(server.url).complete(CHAT) == ("", "length")


class TestKey:
    def test_is_sent_from_the_environment(self, server, monkeypatch):
        server.key = "sk-secret"
        monkeypatch.setenv(KEY_VARIABLE, "sk-secret\n")
        assert OpenAIServer(server.url).complete(CHAT) == ("sat cat the", "stop")

    def test_a_wrong_one_is_refused_and_not_repeated(self, server, monkeypatch):
        server.key = "sk-secret"
        monkeypatch.setenv(KEY_VARIABLE, "sk-mistyped")
        with pytest.raises(ValueError, match=r"HTTP 401.*Set the environment variable OPENAI_API_KEY") as caught:
            OpenAIServer(server.url)
        assert "Incorrect API key provided: Bearer ***" in str(caught.value)

    @pytest.mark.parametrize("key", ["sk-my secret", "sk-sécret", "sk-\nsecret"])
    def test_one_that_no_header_holds_is_refused_and_not_shown(self, server, monkeypatch, key):
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(ValueError, match="OPENAI_API_KEY holds white space") as caught:
            OpenAIServer(server.url)
        assert "sk-" not in str(caught.value)

    def test_nothing_of_netrc_is_sent(self, server, monkeypatch, tmp_path):
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        server.key = "sk-secret"
        with pytest.raises(ValueError, match="provided: None"):
            OpenAIServer(server.url)


class TestRetries:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_a_busy_server_is_asked_again(self, server, status, caplog, propagate):
        logging.Logger.warning_once.cache_clear()
        server.faults.extend([(status, {"error": "busy"})] * 2)
        assert OpenAIServer(server.url, "teacher").complete(CHAT) == ("sat cat the", "stop")
        assert not server.faults
        assert caplog.text.count(f"{server.url} is busy, or does not answer.") == 1

    def test_a_connection_that_ends_is_made_again(self, server):
        server.faults.extend([None, None])
        assert OpenAIServer(server.url, "teacher").complete(CHAT) == ("sat cat the", "stop")

    @pytest.mark.parametrize("kind", ["seconds", "date", "nonsense"])
    def test_retry_after_is_kept_to(self, server, monkeypatch, kind):
        until = formatdate(time.time() + 90, usegmt=True)
        value = {"seconds": "90", "date": until, "nonsense": "soon"}[kind]
        server.faults.append((429, {"error": "busy"}, {"Retry-After": value}))
        pauses = []
        monkeypatch.setattr(openai_server.time, "sleep", pauses.append)
        OpenAIServer(server.url, "teacher").complete(CHAT)
        assert pauses == [0.01] if kind == "nonsense" else 85 < pauses[0] <= 90

    def test_ends_after_some_tries_with_what_the_server_says(self, server):
        server.faults.extend([(503, {"error": "loading"})] * 20)
        with pytest.raises(ValueError, match=r"HTTP 503.*loading.*asked several times"):
            OpenAIServer(server.url, "teacher").complete(CHAT)
        assert len(server.faults) == 13

    def test_a_time_out_says_so(self, server, monkeypatch):
        monkeypatch.setattr(openai_server, "_TIMEOUT", 0.05)
        server.answer = lambda body: time.sleep(0.5) or "late"
        with pytest.raises(ConnectionError, match=r"did not answer \(ReadTimeout"):
            OpenAIServer(server.url, "teacher").complete(CHAT)

    def test_patience_ends(self, server, monkeypatch):
        """A request that takes as long as it may is not sent many times."""
        monkeypatch.setattr(openai_server, "_PATIENCE", 0.0)
        server.faults.extend([(503, {"error": "loading"}), (429, {}, {"Retry-After": 3600})])
        for status in (503, 429):
            with pytest.raises(ValueError, match=f"HTTP {status}"):
                OpenAIServer(server.url, "teacher").complete(CHAT)

    def test_a_server_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(openai_server, "_PAUSES", (0.01,) * 6)
        with pytest.raises(ConnectionError, match=r"did not answer.*that the server is up"):
            OpenAIServer("http://127.0.0.1:9")


class TestBadAnswers:
    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            ((200, b"<html>Welcome</html>"), "did not answer with JSON, but with <html>Welcome"),
            ((200, b'{"choices": [{"message"'), "did not answer with JSON"),
            ((200, b"\xff\xfe\x00"), "did not answer with JSON"),
            ((200, []), "one answer in `choices`.*usually ends with /v1"),
            ((200, {"choices": []}), "one answer in `choices`"),
            ((200, {"choices": [{"message": {}, "finish_reason": "stop"}]}), "one answer in `choices`"),
            ((200, {"choices": [{"message": {"content": "a"}}]}), "one answer in `choices`"),
            ((200, {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}), "that is a text"),
            ((200, {"choices": [{"message": {"content": "a"}, "finish_reason": None}]}), "`finish_reason` None"),
            (
                (200, {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}),
                "`finish_reason` content_filter; only 'stop'.*Filter out the row",
            ),
            ((400, {"error": {"message": "max_tokens is not supported"}}), "HTTP 400.*max_tokens is not supported"),
            ((404, {"detail": "Not Found"}), "HTTP 404.*Check `teacher_answers_url`.*and `teacher_answers_model`"),
            ((307, b"", {"Location": "https://elsewhere/v1"}), "HTTP 307.*to where it points: https://elsewhere"),
        ],
    )
    def test_are_refused_with_what_was_said(self, server, fault, says):
        client = OpenAIServer(server.url, "teacher")
        server.faults.append(fault)
        with pytest.raises(ValueError, match=f"(?s){says}") as caught:
            client.complete(CHAT)
        assert str(caught.value).endswith("It was asked for the answer to 'the cat sat'.")
        assert len(str(caught.value)) < 700

    def test_a_model_that_is_not_there(self, server):
        with pytest.raises(ValueError, match=r"HTTP 404.*The model `student` does not exist.*teacher_answers_model"):
            OpenAIServer(server.url, "student").complete(CHAT)

    def test_a_list_of_models_that_is_none(self, server):
        server.faults.append((200, {"models": []}))
        with pytest.raises(ValueError, match="a list of models"):
            OpenAIServer(server.url)
