package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"raftrv/internal/testkit"
)

func TestConfig_Browsers(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // of the error
	}{
		{[]string{"--allowed-host", "Db.example", "--allowed-host", "db2"}, ""},
		{[]string{"--allowed-host", "http://db"}, "--allowed-host"},
		{[]string{"--allowed-host", "db:80"}, "--allowed-host"},
		{[]string{"--allowed-host", "*"}, "--allowed-host"},
		{[]string{"--allowed-host", ""}, "--allowed-host"},
		{[]string{"--allowed-origin", "https://app.example", "--allowed-origin", "http://127.0.0.1:8080"}, ""},
		{[]string{"--allowed-origin", "*"}, "--allowed-origin"},
		{[]string{"--allowed-origin", "null"}, "--allowed-origin"},
		{[]string{"--allowed-origin", "https://app.example/"}, "--allowed-origin"},
		{[]string{"--allowed-origin", "https://App.example"}, "--allowed-origin"},
		{[]string{"--allowed-origin", "app.example"}, "--allowed-origin"},
		{[]string{"--allowed-origin", "file://x"}, "--allowed-origin"},
	} {
		checkConfigError(t, tt.args, tt.want)
	}
	cfg := configOf(t, "--client-url", "http://Node1.example:80", "--allowed-host", "DB.example")
	if got := cfg.hostNames(); !slices.Equal(got, []string{"db.example", "node1.example"}) {
		t.Errorf("%q", got)
	}
}

// Nobody is told an address that leads everybody to himself.
func TestConfig_ClientURL(t *testing.T) {
	const cluster = "--cluster=http://10.0.0.1:12379,http://10.0.0.2:12379"
	for _, tt := range []struct {
		args []string
		want string // the URL, or a word of the error
	}{
		{nil, "http://127.0.0.1:9121"},
		{[]string{"--listen", "10.0.0.1:80"}, "http://10.0.0.1:80"},
		{[]string{"--listen", "[::1]:80"}, "http://[::1]:80"},
		{[]string{"--listen", "0.0.0.0:80", cluster}, "http://10.0.0.1:80"},
		{[]string{"--listen", ":80", cluster}, "http://10.0.0.1:80"},
		{[]string{"--listen", "[::]:80", cluster, "--id=2"}, "http://10.0.0.2:80"},
		{[]string{"--listen", "0.0.0.0:80", "--client-url", "https://db.example:443"}, "https://db.example:443"},
		{[]string{"--listen", "127.0.0.1:0"}, "--client-url"},
		{[]string{"--listen", "127.0.0.1"}, "--listen"},
		{[]string{"--client-url", "banana"}, "--client-url"},
		{[]string{"--client-url", "ftp://x y"}, "--client-url"},
		{[]string{"--client-url", "http://h:1/p?q#f"}, "--client-url"},
		{[]string{"--client-url", "http://h:1/"}, "--client-url"},
		{[]string{"--client-url", "http://h"}, "--client-url"},
		{[]string{"--client-url", "http://0.0.0.0:1"}, "--client-url"},
		{[]string{"--client-url", "http://[::]:1"}, "--client-url"},
		{[]string{"--cluster", "http://0.0.0.0:12379"}, "--cluster"},
	} {
		if strings.HasPrefix(tt.want, "--") {
			checkConfigError(t, tt.args, tt.want)
		} else if got := configOf(t, tt.args...).clientURL; got != tt.want {
			t.Errorf("%q: %s, want %s", tt.args, got, tt.want)
		}
	}
}

// checkConfigError says whether the flags are refused with this word.
func checkConfigError(t *testing.T, args []string, want string) {
	t.Helper()
	var cfg config
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	cfg.flags(f)
	testkit.Must(t, f.Parse(args))
	err := cfg.validate()
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("%q: %v, want %q", args, err, want)
	}
}
