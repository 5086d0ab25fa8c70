"""A real browser for tests: Debian's Chromium, headless, by Selenium, installed here if that can be."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

NEEDED = {"chromium": ("chromium", "chromium-browser"), "chromium-driver": ("chromedriver",)}
"""Debian packages, and the programs that we look for in them."""
PATIENCE = 60
"""Seconds until something that should happen counts as not happening; a busy machine is slow."""


def program(package: str) -> str | None:
    return next((path for name in NEEDED[package] if (path := shutil.which(name))), None)


def install() -> str | None:
    """Install what is missing, one process at a time; return why it cannot be, or None."""
    missing = [package for package in NEEDED if not program(package)]
    if not missing:
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(missing)} is not installed, and only root can install it, on Debian"
    with (Path(tempfile.gettempdir()) / "palinode-chromium.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["update"], ["install", "-y", "--no-install-recommends", *NEEDED]):
            if all(map(program, NEEDED)):
                return None
            subprocess.run(
                ["apt-get", "-qq", *command],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                check=False,
                timeout=600,
            )
    missing = [package for package in NEEDED if not program(package)]
    return f"apt-get could not install {', '.join(missing)}" if missing else None


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    reason = install()
    if reason:
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=program("chromium-driver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()
