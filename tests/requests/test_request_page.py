"""The page of a ledger: what a browser shows, and what the server behind it refuses."""

from __future__ import annotations

import http.client
import threading

import pytest

from palinode.errors import OutputError
from palinode.requests.telling import ledger_page, server


@pytest.fixture
def port(mine):
    mine.publish(despite="a test")
    mine.withdraw("r2", reason="<script>window.attacked = 1</script>")
    with server(mine.folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def ask(port, path="/", *, host=None, verb="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(verb, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_a_browser_shows_requests_due_dates_verdicts_and_reports(browser, port):
    browser.get(f"http://127.0.0.1:{port}/")
    rows = [row.text for row in browser.find_elements("css selector", "table:first-of-type tbody tr")]
    assert "case 1" in rows[0]
    assert "2026-01-31" in rows[0]
    assert "served" in rows[0]
    assert "to restore" in rows[1]
    assert "withdrawn" in browser.page_source
    assert browser.execute_script("return window.attacked") is None
    assert "1 request waits to be published" in browser.find_element("css selector", ".lead").text
    link = browser.find_element("css selector", "tbody a")
    link.click()
    assert "report.html" in browser.current_url
    assert "Unlearning report" in browser.title
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_only_the_page_and_its_reports_are_served(mine, port):
    assert ask(port)[0] == 200
    key = mine.standing().candidate.folder
    assert ask(port, f"/{key}/report.html")[0] == 200
    for path in (
        "/salt",
        "/ledger.sqlite",
        f"/{key}/record.json",
        f"/{key}/../../salt",
        "/models/../report.html",
    ):
        assert ask(port, path)[0] == 404, path
    for path in ("/audits/../../report.html", "/models/%2e%2e/report.html", "/models/none/report.html"):
        assert ask(port, path)[0] == 404, path
    assert ask(port, verb="POST")[0] == 501


@pytest.mark.parametrize("host", ["example.org", "example.org:80", "127.0.0.1.example.org:1", ""])
def test_a_page_elsewhere_cannot_read_it_under_its_own_name(port, host):
    assert ask(port, host=host or "x")[0] == 403
    assert ask(port, host=f"localhost:{port}")[0] == 200


def test_it_listens_on_this_machine_alone(mine):
    with server(mine.folder, 0) as running:
        assert running.server_address[0] == "127.0.0.1"
        with pytest.raises(OutputError, match="cannot be used"):
            server(mine.folder, running.server_port)


def test_what_is_overdue_is_said_first(mine):
    page = ledger_page(mine.folder)
    assert "3 of 3 overdue" in page
    assert 'class="verdict red"' in page
