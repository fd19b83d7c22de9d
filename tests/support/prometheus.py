"""A real Prometheus, which scrapes a server as ``examples/monitoring`` says."""

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.engines import wait_until
from tests.support.servers import free_port

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query.

        Raises:
            ValueError: Prometheus does not take the expression.
        """
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}") as reply:
                return json.load(reply)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{expression}: {error.read().decode()}") from None

    def is_scraping(self) -> bool:
        try:
            return [s["value"][1] for s in self.query("up")] == ["1"]
        except OSError:
            return False


@contextmanager
def scrape(server_url: str, folder: Path) -> Iterator[Prometheus]:
    """Scrapes a server, every second, until the block ends."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    job["scrape_interval"] = "1s"
    job["static_configs"] = [{"targets": [server_url.removeprefix("http://")]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            *("prometheus", f"--config.file={file}"),
            *(
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        prometheus = Prometheus(f"http://{address}")
        assert wait_until(prometheus.is_scraping, seconds=30), "it scrapes nothing"
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=30)


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of each curve of the Grafana dashboard."""
    file = MONITORING / "grafana" / "budgetdraft.json"
    for panel in json.loads(file.read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "10s")
            yield panel["title"], expression.replace("$model_name", ".*")
