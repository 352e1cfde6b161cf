"""`python -m kdexport`."""

from kdexport.cli import main

main()
