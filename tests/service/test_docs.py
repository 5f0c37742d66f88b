"""The OpenAPI page, and the examples of docs/rest.md run as they stand."""

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

REST = Path(__file__).parents[2] / "docs" / "rest.md"


def test_openapi_tells_the_truth_about_errors(http: httpx.Client) -> None:
    openapi = http.get("/openapi.json").json()
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            codes = {int(code) for code in operation["responses"]}
            assert operation["summary"], path
            assert 500 in codes
            for code, response in operation["responses"].items():
                if int(code) >= 400:
                    assert response["content"] == problem, (path, method, code)
    assert {"400", "409", "412", "413", "415", "422", "428"} <= set(openapi["paths"]["/v1/config"]["patch"]["responses"])
    assert "503" in openapi["paths"]["/readyz"]["get"]["responses"]
    for path, methods in openapi["paths"].items():
        for operation in methods.values():
            assert {"400", "403", "408", "421", "431"} <= set(operation["responses"]), path
    assert "HTTPValidationError" not in str(openapi)
    assert "securitySchemes" not in openapi["components"]


def test_openapi_says_what_a_patch_needs_and_may_hold(http: httpx.Client) -> None:
    openapi = http.get("/openapi.json").json()
    patch = openapi["paths"]["/v1/config"]["patch"]
    assert [(item["name"], item["in"], item["required"]) for item in patch["parameters"]] == [("If-Match", "header", True)]
    assert set(patch["requestBody"]["content"]) == {"application/merge-patch+json", "application/json"}
    for media in patch["requestBody"]["content"].values():
        assert media["schema"] == {"$ref": "#/components/schemas/ConfigPatch"}
    schema = http.get("/v1/config/schema").json()
    assert openapi["components"]["schemas"]["ConfigPatch"] == {name: value for name, value in schema.items() if name != "$schema"}


def test_the_index_leads_to_the_documents(http: httpx.Client) -> None:
    index = http.get("/").json()
    for name in ("docs", "openapi", "status"):
        assert http.get(index[name]).status_code == 200


def test_openapi_names_the_token(guarded: httpx.Client) -> None:
    openapi = guarded.get("/openapi.json", headers={"Authorization": "Bearer s3cret"}).json()
    assert openapi["security"] == [{"bearer": []}]
    assert openapi["paths"]["/healthz"]["get"]["security"] == []
    assert "401" in openapi["paths"]["/v1/status"]["get"]["responses"]


def test_every_reference_in_openapi_leads_somewhere(http: httpx.Client) -> None:
    openapi = http.get("/openapi.json")
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', openapi.text))
    assert "Problem" in names
    assert names <= set(openapi.json()["components"]["schemas"])


def test_the_docs_page_opens_offline(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    for path in http.get("/openapi.json").json()["paths"]:
        assert path in page.text
    assert not re.search(r"<script|https?://|src=", page.text)


def test_every_example_works(url: str, run) -> None:
    bash = shutil.which("bash")
    if bash is None or shutil.which("curl") is None:
        pytest.skip("needs bash and curl")
    examples = re.findall(r"```bash\n(.*?)```", REST.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) >= 9
    for example in examples:
        script = example.replace("http://127.0.0.1:8000", url).replace("curl ", "curl --silent --show-error --fail-with-body --noproxy '*' ")
        done = subprocess.run([bash, "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"
    names = [change.changed["objective.divergence.name"] for change in run.ledger.history()[1:]]
    assert names == [("reverse_kl", "hellinger"), ("hellinger", "alpha"), ("alpha", "forward_kl")]
    assert run.commands == [("checkpoint", "rest"), ("stop", "rest")]
