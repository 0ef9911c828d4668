package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const urls = "http://127.0.0.1:1,http://127.0.0.1:2"

func TestRun_UsesTheClusterThatTheCallerNames(t *testing.T) {
	t.Setenv(urlsEnv, urls)
	var out strings.Builder
	code, err := run(t.Context(), []string{"--", "sh", "-c", "echo $RAFTRV_URLS; exit 7"}, &out, io.Discard)
	if err != nil || code != 7 || out.String() != urls+"\n" {
		t.Errorf("got status %d, error %v, output %q", code, err, out.String())
	}
}

func TestRun_Fails(t *testing.T) {
	t.Setenv(urlsEnv, urls)
	tests := []struct {
		name string
		args []string
		want string
	}{
		{"no command", []string{"-own"}, "no command given"},
		{"no such command", []string{"--", "no-such-command"}, "no-such-command"},
		{"killed command", []string{"--", "sh", "-c", "kill -9 $$"}, "killed"},
		{"no binary", []string{"-own", "-binary", "no-such-raftrv", "--", "true"}, "no-such-raftrv"},
		{"binary is no node", []string{"-own", "-binary", "/bin/sh", "--", "true"}, "ended by itself"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := run(t.Context(), tt.args, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestRun_InterruptsTheCommand(t *testing.T) {
	t.Setenv(urlsEnv, urls)
	ctx, interrupt := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer interrupt()
	start := time.Now()
	_, err := run(ctx, []string{"--", "sleep", "60"}, io.Discard, io.Discard)
	if err == nil || time.Since(start) > interruptTimeout {
		t.Errorf("got %v after %v", err, time.Since(start))
	}
}

// The addresses of make run stand in three places, which cannot share them.
func TestProcfileURLs_AreThoseOfTheProcfileAndOfK6(t *testing.T) {
	for _, file := range []string{"Procfile", "k6.js"} {
		text, err := os.ReadFile(filepath.Join("..", "..", "..", file))
		if err != nil {
			t.Fatal(err)
		}
		for _, url := range procfileURLs {
			want := map[string]string{
				"Procfile": "--port " + strings.TrimPrefix(url, "http://127.0.0.1:") + "\n",
				"k6.js":    url,
			}[file]
			if !strings.Contains(string(text), want) {
				t.Errorf("%s does not have %q", file, want)
			}
		}
	}
}

func TestReady(t *testing.T) {
	status := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/-/readyz" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		w.WriteHeader(status)
	}))
	defer server.Close()
	if ready(t.Context(), server.URL) {
		t.Error("ready at 503")
	}
	status = http.StatusOK
	if !ready(t.Context(), server.URL) {
		t.Error("not ready at 200")
	}
	server.Close()
	if ready(t.Context(), server.URL) {
		t.Error("ready without a server")
	}
}
