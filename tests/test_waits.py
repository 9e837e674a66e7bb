"""Every wait for another thread, process, machine or file has a limit, or `no timeout: ...` in a comment or in its
function's docstring says what ends it. Read off the syntax tree, as the guards in test_packaging.py are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffship"
FILES = sorted(PACKAGE.rglob("*.py"))
REASON = "no timeout:"

# Calls that wait: how many words must stand before the one that is their limit; `timeout=` will do for all.
METHODS = {
    **dict.fromkeys(("join", "get", "result", "exception", "communicate", "wait"), 0),
    **dict.fromkeys(("wait_for", "create_connection"), 1),
    "select": 3,
}
# These take no limit as a word, or are told it elsewhere; with an owner only as they stand here.
ENDLESS = {
    *("recv", "recv_into", "recvfrom", "recv_bytes", "accept", "serve_forever", "run_forever", "sigwait", "input"),
    *("barrier", "all_reduce", "all_gather", "wait_for_everyone", "receive", "readuntil", "readexactly"),
    *("open_connection", "aclose", "wait_closed", "asyncio.gather", "signal.pause", "writer.drain"),
}
TIMED = {"as_completed", "urlopen", "acquire", "AsyncClient", "Client", "HTTPConnection"}  # by `timeout=` alone
STARTED = {"run", "call", "check_call", "check_output"}  # of subprocess
UNBLOCKED = {"flock": "LOCK_NB", "lockf": "LOCK_NB", "waitpid": "WNOHANG", "wait4": "WNOHANG"}
ENTERED = {"Popen", "ThreadPoolExecutor", "ProcessPoolExecutor"}  # at the end of their `with` they wait
PIPES = {"stdin", "stdout", "stderr", "_stream"}
# Methods of ours with such a name that only look, or whose limit is within.
OWN = {"self.breaker.wait", "self._restarts.wait", "self.wait", "players[-1].wait", "player.result"}


def faults(source: str) -> list[str]:
    """`LINE: what waits` of every wait without a limit or a reason."""
    lines = source.splitlines()
    return [f"{node.lineno}: {what}" for node, what in _Waits().of(ast.parse(source)) if not _reasoned(node, lines)]


def _reasoned(node: ast.expr | ast.stmt, lines: list[str]) -> bool:
    """On a line of the call, or in the comment above it."""
    first = node.lineno - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    last = node.lineno if isinstance(node, ast.stmt) else node.end_lineno or node.lineno
    return any(REASON in line for line in lines[first:last])


class _Waits(ast.NodeVisitor):
    def __init__(self) -> None:
        self._found: list[tuple[ast.expr | ast.stmt, str]] = []
        self._limited: set[int] = set()  # calls that something around them limits

    def of(self, tree: ast.AST) -> list[tuple[ast.expr | ast.stmt, str]]:
        self.visit(tree)
        return self._found

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        if any(ast.unparse(item.context_expr).startswith("asyncio.timeout(") for item in node.items):
            self._limited.update(id(inner) for inner in ast.walk(node))
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            entered = isinstance(item.context_expr, ast.Call) and _name(item.context_expr) in ENTERED
            if entered and id(node) not in self._limited:
                self._found.append((node, f"with {ast.unparse(item.context_expr)}"))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if REASON in (ast.get_docstring(node) or ""):  # of all that it does
            self._limited.update(id(inner) for inner in ast.walk(node))
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_For(self, node: ast.For) -> None:
        read = node.iter.values[0] if isinstance(node.iter, ast.BoolOp) else node.iter
        if isinstance(read, ast.Attribute) and read.attr in PIPES:
            self._found.append((node, f"for in {ast.unparse(node.iter)}"))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "asyncio.wait_for" and len(node.args) == 2:
            self._limited.update(id(inner) for inner in ast.walk(node.args[0]))
        if id(node) not in self._limited and _waits(node):
            self._found.append((node, ast.unparse(node.func)))
        self.generic_visit(node)


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _waits(call: ast.Call) -> bool:
    name, written = _name(call), ast.unparse(call.func)
    if written in OWN:
        return False
    words = {word.arg: word.value for word in call.keywords}
    limit = words.get("timeout", words.get("seconds"))
    if limit is not None and ast.unparse(limit) != "None":
        return False
    if written in ("wait", "asyncio.wait", "concurrent.futures.wait"):  # of the futures that come first
        return len(call.args) < 2
    if name == "shutdown":
        return not call.args and "wait" not in words
    if name in ("read", "readline"):
        return isinstance(call.func, ast.Attribute) and bool(PIPES & set(ast.unparse(call.func.value).split(".")))
    if name in UNBLOCKED:
        return UNBLOCKED[name] not in ast.unparse(call)
    if name in STARTED:
        return written.startswith("subprocess.")
    limited = name in METHODS and len(call.args) > METHODS[name]
    return not limited and (name in METHODS or name in TIMED or bool({name, written} & ENDLESS))


@pytest.mark.slow
def test_every_wait_has_a_limit_or_says_what_ends_it() -> None:
    found = {str(file.relative_to(PACKAGE)): faults(file.read_text(encoding="utf-8")) for file in FILES}
    assert {name: waits for name, waits in found.items() if waits} == {}


@pytest.mark.parametrize(
    "code",
    [
        "thread.join()",
        "process.wait(timeout=None)",
        "process.communicate()",
        "future.result()",
        "line = said.get()",
        "lock.acquire()",
        "subprocess.run(['x'])",
        "select.select([pipe], [], [])",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "os.waitpid(child, 0)",
        "with subprocess.Popen(['x']) as process: pass",
        "with ThreadPoolExecutor(2) as pool: pass",
        "for line in process.stdout: pass",
        "process.stdout.read()",
        "wait([future])",
        "changed.wait_for(ready)",
        "torch.distributed.barrier()",
        "async def f():\n    await asyncio.gather(a, b)",
        "async def f():\n    while await queue.get(): pass",
    ],
)
def test_the_guard_sees(code: str) -> None:
    assert faults(code) != []


@pytest.mark.parametrize(
    "code",
    [
        "', '.join(words)",
        "table.get(key)",
        "thread.join(10)",
        "process.wait(timeout=1)",
        "wait([future], 2.0)",
        "subprocess.run(['x'], timeout=3)",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "async def f():\n    await asyncio.wait_for(queue.get(), 3)",
        "async def f():\n    async with asyncio.timeout(3):\n        await receive()",
        "# no timeout: it ends with its process,\n# which is killed\nthread.join()",
        "process.wait()  # no timeout: it was killed",
        "async def f():\n    'Reads; no timeout: its caller has one.'\n    await reader.readuntil(b'x')",
    ],
)
def test_the_guard_lets_pass(code: str) -> None:
    assert faults(code) == []
