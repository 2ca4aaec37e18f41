"""The scripts that other engines' interpreters run, as files: kvrag itself imports none of them."""
