"""Addresses and keys of servers."""

import pytest

from trl_promptkd.generation.servers import ServerKey, check_url


def check(url):
    check_url("url", url, "SOME_KEY", "http://host:8000")


class TestAddress:
    @pytest.mark.parametrize("url", ["http://localhost:8000", "https://api.example.com/openai/v1"])
    def test_good_ones(self, url):
        check(url)

    @pytest.mark.parametrize(
        "url", ["localhost:8000", "", "ftp://host/v1", "http:///v1", "/v1", "http://host:port/v1", "http://[1"]
    )
    def test_bad_ones(self, url):
        with pytest.raises(ValueError, match=r"`url` is '.*must be an address that starts with http"):
            check(url)

    def test_what_is_no_text(self):
        with pytest.raises(TypeError, match="`url` is a int; it must be a text such as 'http://host:8000'"):
            check(8000)

    @pytest.mark.parametrize(
        "url",
        [
            "http://me:secret@host/v1",
            "http://me:secret@host:port",
            "me:secret@host:8000",
            "http:/me:secret@host",
            "http://host/v1?key=secret",
            "http://host/#secret",
        ],
    )
    def test_a_secret_in_it_is_refused_and_not_shown(self, url):
        with pytest.raises(ValueError, match="A key goes into the environment variable SOME_KEY") as caught:
            check(url)
        assert "secret" not in str(caught.value)


class TestKey:
    def test_is_read_once_without_what_a_file_adds(self, monkeypatch):
        monkeypatch.setenv("SOME_KEY", "sk-secret\n")
        key = ServerKey("SOME_KEY")
        assert key
        assert key.headers == {"Authorization": "Bearer sk-secret"}
        assert "secret" not in repr(key)

    def test_none(self, monkeypatch):
        monkeypatch.delenv("SOME_KEY", raising=False)
        assert not ServerKey("SOME_KEY")
        assert ServerKey("SOME_KEY").headers == {}

    @pytest.mark.parametrize("key", ["sk secret", "sk-sécret"])
    def test_one_that_no_header_holds_is_refused_and_not_shown(self, key, monkeypatch):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(ValueError, match="SOME_KEY holds white space or characters beyond ASCII") as caught:
            ServerKey("SOME_KEY")
        assert key not in str(caught.value)

    @pytest.mark.parametrize("before", range(30))
    def test_no_part_of_it_shows_however_what_is_said_is_cut(self, before, monkeypatch):
        monkeypatch.setenv("SOME_KEY", "SECRET")
        said = ServerKey("SOME_KEY").hidden("x" * before + "SECRET" + "x" * 30, 20)
        assert "S" not in said
        assert len(said) <= 23
