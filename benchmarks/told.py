"""A plugin of pytest for `gpu.sh`: failures are told as they happen, not at an end that may never
come where time is short."""


def pytest_runtest_logreport(report):
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", flush=True)
