"""``python -m tdkd`` is ``tdkd``: what launchers of many processes want."""

from tdkd.cli import main

if __name__ == "__main__":
    main()
