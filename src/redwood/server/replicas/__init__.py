"""Several engines behind one address, on Ray Serve: `redwood deploy`.

    client - Ray's proxy - router - engine, engine, ...

`engines.py`: one engine with the server's application around it. `router.py`: the application in
front of them. It holds the client's connection, so that when an engine dies the request is repeated
on another one, or the client gets an error, instead of a broken stream. `gathered.py`: metrics and
health of all replicas on one page. `plan.py`: the configuration; `deployments.py` makes Ray Serve's
application of it; `running.py` runs that on this machine. Only the last two import Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redwood.errors import UnsupportedError

INSTALL = 'pip install "redwood[ray]"'


def application(args: Mapping[str, Any]) -> Any:
    """Returns Ray Serve's application, for `import_path: redwood.server.replicas:application`.

    Args:
        args: of `DeployPlan.from_args`.

    Raises:
        UnsupportedError: Ray is not installed.
        ArgumentError: see `DeployPlan.from_args`.
    """
    check_ray()
    from redwood.server.replicas.deployments import build
    from redwood.server.replicas.plan import DeployPlan

    return build(DeployPlan.from_args(args))


def check_ray() -> None:
    """Raises UnsupportedError, with the command that installs it, if Ray Serve is missing."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"replicas need Ray Serve ({error}): {INSTALL}") from None
