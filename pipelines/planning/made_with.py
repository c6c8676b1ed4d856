"""Says what manifests tell of the settings that tables of impressions were made with.

Tables go on from each other, or are trained on together, only where these are alike.
"""

from typing import Any

from pipelines.config import Settings


def history_settings(settings: Settings) -> dict[str, Any]:
    """Returns what manifests say of the law of histories."""
    return {
        "history_len": settings.history_len,
        "keep_repeats": settings.keep_repeats,
        "late_days": settings.late_days,
        "history_start_ds": settings.history_start_ds and str(settings.history_start_ds),
        **_click_settings(settings),
    }


def rows_settings(settings: Settings) -> dict[str, Any]:
    """Returns what manifests say of how training rows were made."""
    return {
        **_click_settings(settings),
        "categories": sorted(set(settings.training.categories)) or None,
        "request_gap_seconds": settings.training.request_gap_seconds,
    }


def _click_settings(settings: Settings) -> dict[str, Any]:
    return {
        "window_days": settings.window_days,
        "click_delay_seconds": settings.log.click_delay_seconds,
        "history_lag_seconds": settings.history_lag_seconds,
        "day_timezone": settings.day_timezone,
    }
