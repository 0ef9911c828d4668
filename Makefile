# make help lists what there is. Tools are pinned in modules of their own, tools/<name>/go.mod, so that the
# program's go.mod stays lean; the first use of one builds it, which for k6 takes a minute or two.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

tool         = $(GO) tool -modfile=tools/$(1)/go.mod $(1)
GOLANGCI_LINT = $(call tool,golangci-lint)
GOREMAN       = $(call tool,goreman) -set-ports=false
GOVULNCHECK   = $(call tool,govulncheck)
CYCLONEDX     = $(call tool,cyclonedx-gomod)
K6            = $(call tool,k6) run --no-usage-report $(if $(CI),--quiet) k6.js
WITHCLUSTER   = $(GO) run ./internal/cmd/withcluster

.DEFAULT_GOAL := raftrv

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Phony, because go build knows better than make what is out of date.
.PHONY: raftrv
raftrv: ## build ./raftrv (the default)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o raftrv .

.PHONY: run
run: raftrv ## build, and run three nodes with goreman until Ctrl-C; their data stays
	$(GOREMAN) start

.PHONY: goreman
goreman: ## talk to that goreman, as in: make goreman ARGS="run stop raftrv2"
	$(GOREMAN) $(ARGS)

.PHONY: test
test: load ## run the load test, then the Go tests
	$(GO) test -p 1 ./...

.PHONY: load
load: raftrv ## run the k6 load test, on the running cluster or else on its own
	$(WITHCLUSTER) -- $(K6)

.PHONY: load-check
load-check: ## see that the load test fails when it should, and only then
	cd tools/k6 && $(GO) vet ./... && $(GO) test ./...

.PHONY: check
check: ## everything that CI runs
	.ci/run

.PHONY: fmt-check
fmt-check:
	@files=$$(gofmt -l .); test -z "$$files" || { echo "make fmt would change:" $$files; exit 1; }

.PHONY: vet
vet:
	$(GO) vet ./...
	GOOS=darwin CGO_ENABLED=0 $(GO) build ./... # the files that are not for Linux

.PHONY: lint
lint: ## run golangci-lint
	$(GOLANGCI_LINT) run

# -short leaves out the tests that start nodes: those are built without the race detector, and make test runs them.
.PHONY: race
race: ## run the Go tests that start no processes under the race detector
	$(GO) test -p 1 -race -short -timeout 20m ./...

# A module of its own, since only this test needs what drives a browser. -v says so if it is skipped.
.PHONY: browser
browser: ## watch with a real browser, if there is one
	cd internal/browser && $(GO) vet ./... && $(GO) test -v ./...

# Known vulnerabilities in what we link. Without a network there is no answer, which is no failure.
.PHONY: vuln
vuln: ## look for known vulnerabilities in the dependencies
	@echo "$(GOVULNCHECK) ./..."; \
	out=$$($(GOVULNCHECK) ./... 2>&1) && status=0 || status=$$?; \
	echo "$$out"; \
	if [ $$status -ne 0 ] && echo "$$out" | grep -q 'fetching vulnerabilities'; then \
		echo "SKIPPED: no vulnerabilities looked for, because their database cannot be reached from here"; \
	else \
		exit $$status; \
	fi

# What is in each binary is written down beside it: the CycloneDX bill of materials of what it links, and a digest.
RELEASE_TARGETS ?= linux/amd64 linux/arm64

.PHONY: release
release: ## build the binaries of a release, their bills of materials and digests, in dist/
	@mkdir -p dist
	@for target in $(RELEASE_TARGETS); do \
		name=raftrv-$(VERSION)-$$(echo $$target | tr / -); \
		echo "building dist/$$name"; \
		GOOS=$${target%/*} GOARCH=$${target#*/} CGO_ENABLED=0 \
			$(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o dist/$$name . && \
		$(CYCLONEDX) bin -json -std -version $(VERSION) -output dist/$$name.cdx.json dist/$$name || exit 1; \
	done
	@cd dist && sha256sum raftrv-$(VERSION)-* > raftrv-$(VERSION).sha256 && cat raftrv-$(VERSION).sha256

.PHONY: lab
lab: ## run the 25 scenarios of the raft labs and print the course's lines
	$(GO) test -count=1 -run 'TestLab$$' -lab.report .

SEEDS ?= 500

.PHONY: sim
sim: ## run the simulator; SEEDS=500
	$(GO) test -count=1 -run 'TestSim$$' -sim.seeds=$(SEEDS) -sim.report -timeout 2h .

.PHONY: planted
planted: ## plant bugs and print how soon the simulator finds each
	$(GO) test -count=1 -run 'TestPlanted$$' -planted.report -timeout 1h .

# The replica, the store and storage.
FILES  ?= raft.go loop.go storage.go watermark.go
SAMPLE ?= 50
SEED   ?= 1

.PHONY: mutate
mutate: ## plant small bugs and print those that no quick test notices; SAMPLE=50 (0: all) SEED=1 FILES="raft.go"
	$(GO) run ./internal/cmd/mutate -sample $(SAMPLE) -seed $(SEED) -out mutate.out $(FILES)

.PHONY: process
process: ## real processes: stops, kills, a node far behind, at full size
	$(GO) test -count=1 -run TestProcess -heavy -timeout 30m -v ./tests

.PHONY: chaos
chaos: ## real processes under kills, pauses and partitions, for minutes
	$(GO) test -count=1 -run TestChaos -chaos 5m -timeout 30m -v ./tests

.PHONY: bench
bench: ## run the Go benchmarks
	$(GO) test -run '^$$' -bench . -benchmem ./...

.PHONY: bench-http
bench-http: raftrv ## measure a cluster beside an empty handler (needs wrk); ARGS="-reps 1 -cells put"
	$(GO) run ./internal/cmd/benchhttp $(ARGS)

.PHONY: fmt
fmt: ## format the Go files
	gofmt -w .

.PHONY: cover
cover: ## run the Go tests and show how much of each function they reach
	$(GO) test -coverprofile=cover.out ./...
	$(GO) tool cover -func=cover.out

.PHONY: clean
clean: ## delete the binary and the data of make run, saying what
	@for f in raftrv raftrv-1 raftrv-2 raftrv-3 cover.out mutate.out; do \
		if [ -e $$f ]; then echo "deleting $$f"; rm -r $$f; fi; \
	done
