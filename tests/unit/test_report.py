"""The page of a comparison holds its numbers, needs nothing else, and can be seen."""

import itertools
import json
import shutil
import subprocess

import pytest

from vllm_budgetdraft.cli import main
from vllm_budgetdraft.comparison.report import page, write
from vllm_budgetdraft.comparison.serving import KEYS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def row_of(kind: str, task: str, context: int, budget: int | None, length: int | None):
    speedup = 1.0 if length is None else 1 + 400 / context + (budget or 0) / 1000
    return {
        "method": f"{kind} {budget} {length}",
        "kind": kind,
        "num_speculative_tokens": length,
        "kv_budget": budget,
        "eviction_policy": "chunk_retrieval" if budget else None,
        "task": task,
        "context_tokens": context,
        "temperature": 0.0,
        "drafts": "greedy" if kind == "budgetdraft" else None,
        "num_runs": 5,
        "output_throughput": 100.0 * speedup,
        "ttft_ms": 50.0,
        "tpot_ms": 10.0 / speedup,
        "speedup": speedup,
        "speedup_p20": 0.9 * speedup,
        "speedup_p80": 1.1 * speedup,
        "decode_speedup": 1.2 * speedup,
        "decode_speedup_p20": speedup,
        "decode_speedup_p80": 1.3 * speedup,
        "acceptance_length": None if length is None else 1 + length / 3,
        "acceptance_per_position": [0.9**i for i in range(length or 0)],
        "output_identical": 1.0,
        "distinct_4grams": 0.63,
        "draft_share": 0.2,
        "verify_share": 0.7,
        "rest_share": 0.1,
        "peak_memory_bytes": 3 * 2**30,
        "kv_cache_tokens": 1000,
    }


@pytest.fixture(scope="module")
def document() -> dict:
    places = list(itertools.product(("books", "qmsum"), (1024, 4096)))
    settings = [("vllm", None, None), ("ngram", None, 4), ("ngram", None, 8)]
    settings += [("budgetdraft", b, k) for b in (256, 512) for k in (4, 8)]
    return {
        "results": [
            row_of(kind, *place, budget, length)
            for kind, budget, length in settings
            for place in places
        ],
        "serving": [
            {
                "method": f"{kind} k=4",
                "kind": kind,
                "kv_budget": None,
                "eviction_policy": None,
                "num_speculative_tokens": 4,
                "max_concurrency": concurrency,
                "num_runs": 3,
                "speedup": 1.25,
                **dict.fromkeys(KEYS, 17.0 + concurrency),
            }
            for kind in ("vllm", "ngram")
            for concurrency in (1, 4)
        ],
        "notes": ["The target is <padded>."],
        "provenance": {
            "time": "2026-01-01T00:00:00+00:00",
            "machine": {"cpu": "A CPU", "gpu": None, "cores": 2},
        },
    }


def test_a_page_holds_every_number_and_nothing_from_elsewhere(document):
    html = page({"run": document})
    assert "The target is &lt;padded&gt;." in html
    assert "budgetdraft 512 4" in html and "budgetdraft 512 8" not in html
    fastest = max(row["speedup"] for row in document["results"])
    assert f"{fastest:.2f}x" in html
    assert html.count("<svg") == 11
    assert "Behind vllm serve" in html and "ngram k=4" in html
    for outside in ("<script", "<link", "src=", "@import", "url(http"):
        assert outside not in html


def test_the_same_numbers_give_the_same_page(document):
    assert page({"run": document}) == page({"run": document})


def test_an_output_that_differs_is_said_so(document):
    rows = [{**row, "output_identical": 0.8} for row in document["results"]]
    html = page({"run": {**document, "results": rows}})
    assert '<td class="no">NO (1)</td>' in html
    assert '<td class="no">' not in page({"run": document})


def test_a_tie_is_no_fault(document):
    changes = {"output_identical": 0.6, "output_ties": 2, "output_gap": 0.0625}
    rows = [{**row, **changes} for row in document["results"]]
    html = page({"run": {**document, "results": rows}})
    assert "<td>2 ties, gap 0.0625</td>" in html and '<td class="no">' not in html


def test_temperatures_and_chats_have_places_of_their_own(document):
    rows = document["results"]
    drawn = [
        {**row, "temperature": 0.7, "drafts": "drawn", "output_identical": None}
        for row in rows
    ]
    chats = [
        {**row, "task": "chat", "context_tokens": 150, "prompt_tokens": 83.5}
        for row in rows
        if (row["task"], row["context_tokens"]) == ("books", 1024)
    ]
    # Of answers that had one token only.
    names = ("decode_speedup", "decode_speedup_p20", "decode_speedup_p80")
    chats[-1].update(dict.fromkeys(names))
    served = [
        {**row, "task": "chat", "context_tokens": 150, "temperature": 0.7}
        for row in document["serving"]
    ]
    many = {**document, "results": rows + drawn + chats, "serving": served}
    html = page({"run": many})
    assert html.count("<td>books, temperature 0.7</td>") == html.count("<td>books</td>")
    assert "<td>84 (to 150)</td>" in html and "chat, 84 (to 150) tokens" in html
    assert "<td>drawn</td><td>0.63</td><td></td>" in html
    assert html.count("<td>chat, temperature 0.7</td>") == len(served)


def test_the_command_puts_several_runs_on_one_page(document, tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, document)
    assert json.loads((tmp_path / "first" / "results.json").read_text()) == document
    assert (tmp_path / "first" / "speedup.svg").read_text().startswith("<svg")
    assert (tmp_path / "first" / "results.csv").read_text().count("\n") == 29
    output = tmp_path / "both.html"
    main(["report", *(str(tmp_path / n) for n in ("first", "second"))]
         + ["--output", str(output)])  # fmt: skip
    assert "books (first)" in output.read_text()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--output", str(output)])
    assert "has no results.json" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_a_browser_shows_it_without_a_word(document, tmp_path):
    import matplotlib.image

    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(page({"run": document}), encoding="utf-8")
    shown = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", "--window-size=1200,4000"),
            *(f"--screenshot={picture}", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in shown.stderr
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (4000, 1200)
    for third in range(3):  # the figures go on to the page's end
        some = pixels[third * 1000 : (third + 1) * 1000]
        assert some.std() > 0.05, third
