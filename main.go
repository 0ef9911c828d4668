package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "raftrv:", err)
	if errors.Is(err, errRemoved) {
		os.Exit(exitRemoved)
	}
	os.Exit(1)
}

// exitRemoved is the status of a node that was removed from its cluster, for
// which starting it again is of no use.
const exitRemoved = 3

// run is the program without the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := newRootCommand(stderr)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

func newRootCommand(stderr io.Writer) *cobra.Command {
	root := newServeCommand("raftrv", stderr)
	root.Short = "A replicated key-value store that is driven with curl"
	root.Long = `raftrv is a replicated key-value store that is driven with curl.

Without a subcommand it runs one node, like "raftrv serve". Three of them make a
cluster that survives the loss of any one:

  PEERS=http://127.0.0.1:12379,http://127.0.0.1:22379,http://127.0.0.1:32379
  raftrv --id 1 --cluster $PEERS --port 12380
  raftrv --id 2 --cluster $PEERS --port 22380
  raftrv --id 3 --cluster $PEERS --port 32380

  curl -X PUT -d hello http://127.0.0.1:12380/greeting
  curl http://127.0.0.1:32380/greeting`
	root.SilenceUsage = true
	root.SilenceErrors = true
	root.CompletionOptions.HiddenDefaultCmd = true
	serve := newServeCommand("serve", stderr)
	serve.Short = "Run one node"
	root.AddCommand(serve, newBackupCommand(), newSnapshotCommand(), newRecoverCommand(), newVersionCommand())
	return root
}

func newServeCommand(use string, stderr io.Writer) *cobra.Command {
	var cfg config
	cmd := &cobra.Command{
		Use:  use,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := cfg.validate(); err != nil {
				return err
			}
			logs := newLogQueue(stderr)
			defer logs.close()
			logger, level := newLogger(logs, cfg.logLevel, cfg.logFormat)
			boundGarbage()
			setSegmentBytes(cfg.segmentBytes)
			cfg.abandon = func() {
				_ = logs.Sync() // never fails; it has the reason
				os.Exit(1)
			}
			// A closed terminal, or what rotates a journal, does not end a node.
			hangUps := make(chan os.Signal, 1)
			signal.Notify(hangUps, syscall.SIGHUP)
			defer signal.Stop(hangUps)
			cfg.hangUps = hangUps
			syscall.Umask(0o077) // the log and the snapshots are for this user only
			return serve(cmd.Context(), cfg, logger, level)
		},
	}
	cfg.flags(cmd.Flags())
	return cmd
}

func newVersionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			out := cmd.OutOrStdout()
			if asJSON {
				return json.NewEncoder(out).Encode(map[string]string{"version": version, "go": runtime.Version()})
			}
			_, err := fmt.Fprintf(out, "raftrv %s (%s)\n", version, runtime.Version())
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// newLogger returns a logger that writes to w, and its level, which may be
// changed. level and format are valid.
func newLogger(w io.Writer, level, format string) (*zap.Logger, zap.AtomicLevel) {
	encoding := zap.NewProductionEncoderConfig()
	encoding.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(encoding)
	if format == "console" {
		encoding.EncodeTime = zapcore.TimeEncoderOfLayout("15:04:05.000")
		encoding.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(encoding)
	}
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		l = zapcore.InfoLevel
	}
	atomic := zap.NewAtomicLevelAt(l)
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(zapcore.AddSync(w)), atomic)), atomic
}
