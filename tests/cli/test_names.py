import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from trl_promptkd.cli import names


def answered(status, error):
    return error("said by the Hub", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the Hub says of every name; `None` if it has one."""
    said = []

    def repo_info(self, name, repo_type, timeout, token):
        if said[0] is not None:
            raise said[0]

    monkeypatch.setattr(names.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(names, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return said


class TestCheckName:
    @pytest.mark.parametrize(
        ("error", "why"),
        [
            (answered(404, RepositoryNotFoundError), "no model of the Hub has this name, or it is private"),
            (HFValidationError("a/b/c"), "no model of the Hub has this name, or it is private"),
            (httpx2.ConnectError("no network"), r"not in the cache and the Hub cannot be reached \(ConnectError\)"),
            (OfflineModeIsEnabled("x"), r"not in the cache and the Hub cannot be reached \(OfflineModeIsEnabled\)"),
        ],
    )
    def test_a_name_that_is_nowhere_is_refused_in_one_line(self, hub, error, why):
        hub.append(error)
        with pytest.raises(
            OSError, match=rf"`--model` is 'nope': there is no such folder \(.*\), and .*{why}"
        ) as found:
            names.check_name("--model", "nope")
        assert "\n" not in str(found.value)

    @pytest.mark.parametrize(
        "error", [None, answered(403, GatedRepoError), answered(503, HfHubHTTPError), answered(429, HfHubHTTPError)]
    )
    def test_what_may_be_there_is_left_to_who_loads_it(self, hub, error):
        hub.append(error)
        names.check_name("--model", "me/model")

    @pytest.mark.parametrize(("kind", "folder"), [("model", "models--me--x"), ("dataset", "datasets--me--x")])
    def test_what_is_in_the_cache_or_a_folder_is_not_looked_up(self, hub, tmp_path, kind, folder):
        hub.append(httpx2.ConnectError("no network"))
        with pytest.raises(OSError, match="cannot be reached"):
            names.check_name("--x", "me/x", kind)
        (tmp_path / "hub" / folder).mkdir(parents=True)
        (tmp_path / "run").mkdir()
        names.check_name("--x", "me/x", kind)
        names.check_name("--x", "run", kind)
