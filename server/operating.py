"""What makes a server fit for operation, put together: keys, limits, usage, metrics, logs, traces, an orderly end."""

from collections.abc import Mapping

from fastapi import FastAPI

from deltaserve.delta_store.errors import RegistryUnavailable
from deltaserve.server.access.door import Door, check_start
from deltaserve.server.access.keys import KeyStore
from deltaserve.server.access.rates import Rates
from deltaserve.server.access.usage import Ledger
from deltaserve.server.access.visits import Visits
from deltaserve.server.draining import Draining
from deltaserve.server.metrics import Metrics
from deltaserve.server.metrics_state import StateMetrics
from deltaserve.server.settings import Settings
from deltaserve.server.traffic import Traffic


def install(app: FastAPI, settings: Settings) -> None:
    """Give ``app.state`` its ``keys``, ``ledger``, ``metrics``, ``visits`` and ``draining``, the app its middleware.

    Called before the base is loaded. Raises OptionError where the server must not start.
    """
    state = app.state
    state.keys = KeyStore(settings.folder / "keys.sqlite3")
    check_start(settings, state.keys)
    state.metrics = Metrics(settings.base_name, settings.metrics_variants)
    state.metrics.registry.register(
        StateMetrics(state.metrics.labels, lambda: state.engine.state(), lambda: artifact_bytes(app))
    )
    state.draining = Draining(settings.shutdown_seconds)
    state.ledger = Ledger(settings.folder / "usage.sqlite3")
    tracing = None
    if settings.otlp_endpoint is not None:
        from deltaserve.server.tracing import Tracing

        tracing = Tracing(settings.otlp_endpoint)
    rates = Rates(settings.limits_storage)
    state.visits = Visits(state.keys, rates, state.ledger, state.metrics, settings, tracing)
    app.add_middleware(Door, keys=state.keys, settings=settings)
    if tracing is not None:
        app.add_middleware(tracing.middleware)
    app.add_middleware(Traffic, metrics=state.metrics, draining=state.draining)


def close(app: FastAPI) -> None:
    """Write what is not written yet, and close the files."""
    visits: Visits = app.state.visits
    visits.rates.close()
    visits.ledger.close()
    visits.keys.close()
    if visits.tracing is not None:
        visits.tracing.close()


def artifact_bytes(app: FastAPI) -> Mapping[str, int] | None:
    """The size of each variant's current artifact, None while the registry does not answer."""
    try:
        return {one.variant: one.receipt.size_bytes for one in app.state.registry.variants()}
    except RegistryUnavailable:
        return None
