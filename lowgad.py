"""The command line, and the only place where service, worker and models meet."""

from __future__ import annotations

import click


@click.group()
@click.version_option(package_name="lowgad")
def main() -> None:
    """Predict standard-dose contrast enhancement from reduced-dose brain MRI. Research use only."""


if __name__ == "__main__":
    main()
