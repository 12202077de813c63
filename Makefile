# make run     start a gateway from nothing      make test    install what the tests need, run them
# make check   format, lint, types, layers       make bench   measure against peers
# make prove   the long proofs in full size      make docs    the documentation as a site, in build/site
# make clean   remove what these made (./var stays)
# make lock    lock what is installed, by hash   make bounds  test with the lowest and the newest dependencies
# make audit   known weaknesses of what is locked

# The newest Python there is, 3.11 at least; or the one that is given: make run PYTHON=/opt/python/bin/python3
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
CTL := $(BIN)/gatewayctl
PEERS := mosquitto mosquitto-clients postgresql mariadb-server openssl nodejs gnutls-bin stunnel4 rabbitmq-server redis-server curl \
	gcc libc6-dev libmbedtls-dev libwolfssl-dev golang-go prometheus tshark \
	haproxy nginx-core libnginx-mod-stream systemd \
	libfaketime nftables iproute2

TEST_LOCK := tests/requirements.lock
CONTAINER_LOCK := deploy/container/requirements.lock
BUILD_LOCK := deploy/container/build.lock
# For every platform and every Python from 3.11, and without a word of where it was found.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-annotate --no-strip-extras

# Many processes of the gateway start, in the tests above all: what is compiled once need not be compiled by each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test check bench prove docs reference clean peers lock audit bounds

run: .venv/installed
	@test -e var/gateway.toml || { echo "Making a configuration and a registry in ./var"; $(CTL) init var >/dev/null; }
	@$(CTL) migrate --config var/gateway.toml >/dev/null
	@test -s var/demo.key || { \
		$(CTL) remove-device demo --config var/gateway.toml >/dev/null 2>&1 || true; \
		(umask 077; $(BIN)/python -c 'import secrets; print(secrets.token_hex(32))' >var/demo.key); }
	@$(CTL) show-device demo --config var/gateway.toml >/dev/null 2>&1 || { \
		echo "Adding the device demo, its key is in var/demo.key"; \
		$(CTL) add-device demo --key-file var/demo.key --config var/gateway.toml >/dev/null; }
	@echo "The gateway runs in the foreground, Ctrl-C ends it. In another terminal, in this folder, type:"
	@echo
	@echo "    $(CTL) connect $$($(CTL) check-config --config var/gateway.toml --json | \
		$(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["listeners"][0]["bind"].replace("0.0.0.0", "127.0.0.1"))') \
	--identity demo --key-file var/demo.key"
	@echo
	@echo "then a line of text; each is answered \"ok N\" once it stands in var/events.jsonl."
	@exec $(CTL) run --config var/gateway.toml

# In three processes, since tests wait more than they compute. Many of them kill, freeze and time real programs: one that
# fails is tried once more, and the summary counts it as rerun.
test: .venv/installed-dev peers
	$(BIN)/python -m pytest -m "not prove" --numprocesses 3 --dist loadfile --reruns 1

check: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

# A warning, such as of a link that leads nowhere, is an error. The variable silences an advertisement of the theme.
docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "The site is in build/site"

# docs/reference, from the code
reference: .venv/installed-dev
	$(BIN)/python -m docs.generate

# make bench BENCH=--quick; make bench BENCH='memory stream'
bench: .venv/installed-dev peers
	$(BIN)/python -m bench $(BENCH)

prove: .venv/installed-dev peers
	$(BIN)/python -m pytest -m prove

# Versions that are locked stay as they are while they fit; make lock UPGRADE=--upgrade takes the newest.
lock: .venv/installed-dev
	@$(COMPILE) $(UPGRADE) pyproject.toml --extra dev --group build --output-file $(TEST_LOCK) >/dev/null
	@$(COMPILE) $(UPGRADE) pyproject.toml --extra all --output-file $(CONTAINER_LOCK) >/dev/null
	@$(COMPILE) $(UPGRADE) --group pyproject.toml:build --output-file $(BUILD_LOCK) >/dev/null

# Asks a service on the Internet about every version in the locks.
audit: .venv/installed-dev
	@for lock in $(TEST_LOCK) $(CONTAINER_LOCK) $(BUILD_LOCK); do \
		echo "$$lock"; $(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement $$lock || failed=1; \
	done; test -z "$$failed"

# The bounds in pyproject.toml: the same tests with the lowest versions that it allows, and with the newest there are, also on
# each newer Python that is installed. The reference is generated with the locked versions: others describe options in other words.
BOUNDS_TESTS := tests/unit tests/property tests/interop/test_openssl.py tests/integration/test_lines.py \
	--ignore tests/unit/docs/test_reference.py
bounds: .venv/installed-dev peers
	@newer=$$(for python in python3.12 python3.13; do \
		$$python -c '' 2>/dev/null && echo "$$($$python -c 'import sys; print(sys.executable)')=highest"; done); \
	for bounds in $(BIN)/python=lowest-direct $(BIN)/python=highest $$newer; do \
		python=$${bounds%=*} versions=$${bounds#*=}; \
		echo "With the $$versions versions, on $$($$python --version)"; \
		$(BIN)/uv venv --quiet --clear --python $$python build/bounds \
		&& $(BIN)/uv pip install --quiet --python build/bounds --resolution $$versions --editable '.[dev]' \
		&& build/bounds/bin/python -m pytest --quiet -m "not prove" --reruns 1 $(BOUNDS_TESTS) || exit 1; \
	done

clean:
	rm -rf .venv build dist bench/build .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find gateway migrations tests bench docs -name __pycache__ -prune -exec rm -rf {} +

# The stamps: .venv is made anew when pyproject.toml changed, and a second call costs nothing.
.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found, name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making .venv with $(PYTHON) and installing the gateway into it"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: no virtual environment, on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# What tests and checks run on is locked, by version and hash: nothing else is installed, nor does it build the package.
.venv/installed-dev: .venv/installed $(TEST_LOCK)
	@echo "Installing the tools for tests and checks into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(TEST_LOCK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# Real servers and clients for the tests. Those that are missing are skipped visibly, or fail the tests when CI is set.
peers:
	@missing=$$(for package in $(PEERS); do \
		dpkg-query --show --showformat='$${Status}' $$package 2>/dev/null | grep -q '^install ok installed$$' || echo $$package; done); \
	if ! command -v apt-get >/dev/null; then echo "Not on Debian: tests use those peers that are installed ($(PEERS))"; \
	elif test -z "$$missing"; then true; \
	elif test "$$(id -u)" != 0; then echo "Not root: tests that need them are skipped:" $$missing; \
	else echo "Installing peers for the tests:" $$missing; \
		{ apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends $$missing; } >/dev/null \
		|| echo "apt-get failed: tests that need them are skipped:" $$missing; \
	fi
