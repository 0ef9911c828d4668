package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"raftrv/internal/fsx"
	"raftrv/internal/httpapi"
	"raftrv/internal/store"
)

// This file is the commands that take and use backups, and the one for a
// cluster that has lost its majority.

func newBackupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup",
		Short: "Save, inspect and restore backups",
		Args:  cobra.NoArgs,
	}
	cmd.AddCommand(newSaveCommand(), newInspectCommand(), newRestoreCommand())
	return cmd
}

// newSnapshotCommand tells those who know these commands by their old name. Without
// it, all that they would learn is that a flag is unknown.
func newSnapshotCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "snapshot",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("there is no command snapshot: see raftrv backup --help")
		},
	}
}

func newSaveCommand() *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:   "save FILE",
		Short: "Save a backup of a running cluster",
		Long: `Save a backup of a running cluster, from any of its nodes. It holds what the
cluster held at one moment; writes go on meanwhile. FILE is replaced when the
backup is complete and its checksum right, and not touched before.`,
		Example: "  raftrv backup save --from http://127.0.0.1:12380 backup",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			saved, err := saveBackup(cmd.Context(), from, args[0])
			if err != nil {
				return fmt.Errorf("save a backup of %s: %w", from, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "saved %s: %d bytes, resource version %s, raft index %s, cluster %s\n",
				args[0], saved.size, saved.header.Get("Resource-Version"), saved.header.Get(httpapi.HeaderIndex), saved.header.Get(httpapi.HeaderCluster))
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "http://127.0.0.1:9121", "`URL` at which clients reach a node")
	return cmd
}

// Limits of saving a backup.
const (
	saveHeaderTimeout = 30 * time.Second // more than a node takes to say that it cannot
	saveStallTimeout  = 60 * time.Second // without a byte
)

// savedBackup is what is known of a backup without reading it.
type savedBackup struct {
	header http.Header
	size   int64
}

// saveBackup fetches a backup and puts it in place.
func saveBackup(ctx context.Context, from, path string) (*savedBackup, error) {
	if err := fsx.CheckReplaceable(path); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(from, "/")+"/-/v1/backup", nil)
	if err != nil {
		return nil, err
	}
	client := http.Client{Transport: &http.Transport{ResponseHeaderTimeout: saveHeaderTimeout, DisableCompression: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, answeredError(resp)
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-") // mode 0600
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(file.Name()) }() // fails after the rename
	stall := time.AfterFunc(saveStallTimeout, func() { cancel(fmt.Errorf("no byte came for %v", saveStallTimeout)) })
	defer stall.Stop()
	digest := sha256.New()
	body := io.TeeReader(resp.Body, progress(func() { stall.Reset(saveStallTimeout) }))
	size, err := io.Copy(io.MultiWriter(file, digest), body)
	if err == nil {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, fmt.Errorf("%w after %d bytes; nothing was saved", cmp.Or(context.Cause(ctx), err), size)
	}
	if got, want := httpapi.FormatDigest(digest), resp.Trailer.Get(httpapi.HeaderDigest); got != want {
		return nil, fmt.Errorf("its digest is %s, should be %q; nothing was saved", got, want)
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return nil, err
	}
	return &savedBackup{header: resp.Header, size: size}, fsx.SyncDir(filepath.Dir(path))
}

// progress is called for every part.
type progress func()

func (p progress) Write(b []byte) (int, error) {
	p()
	return len(b), nil
}

// answeredError is what a node said instead of doing what it was asked for.
func answeredError(resp *http.Response) error {
	var p httpapi.Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<16)).Decode(&p); err != nil || p.Message == "" {
		return fmt.Errorf("the node answered %s", resp.Status)
	}
	return fmt.Errorf("the node answered %s: %s", resp.Status, p.Message)
}

func newInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect FILE",
		Short: "Check a backup and tell what is in it",
		Long: `Check a backup and tell what is in it. It reads all of it into memory, and fails
if anything is damaged or missing.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := store.ReadBackup(args[0])
			if err != nil {
				return err
			}
			return printBackup(b, cmd.OutOrStdout())
		},
	}
}

func printBackup(b *store.BackupFile, w io.Writer) error {
	var members []string
	for _, m := range b.State.SortedMembers() {
		members = append(members, fmt.Sprintf("%d=%s", m.ID, m.PeerURL))
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"checksum", "ok, SHA-256 " + b.Digest},
		{"format", fmt.Sprint(b.Format)},
		{"taken", fmt.Sprintf("%s from node %d by raftrv %s", b.Time.Format(time.RFC3339), b.Member, b.Version)},
		{"cluster", b.Cluster},
		{"members", strings.Join(members, ",")},
		{"resource version", fmt.Sprint(b.State.RV)},
		{"raft index", fmt.Sprint(b.State.Index)},
		{"raft term", fmt.Sprint(b.State.Term)},
		{"keys", fmt.Sprint(b.State.Items.Len())},
		{"bytes", fmt.Sprintf("%d of keys and values, %d of the file", b.Bytes(), b.Size)},
	} {
		fmt.Fprintf(t, "%s\t%s\n", line[0], line[1])
	}
	return t.Flush()
}

func newRestoreCommand() *cobra.Command {
	var cfg config
	var above uint64
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make the data directory of a node of a new cluster from a backup",
		Long: `Make the data directory of a node of a new cluster from a backup. Do it once
for each node, with the same FILE, --cluster and --cluster-token, then start the
nodes. They found the cluster when all of them are there.

The new cluster has another cluster ID than the old one, so their nodes never
mix. Its resource versions go on far above those of the backup, and a watch that
wants to resume from an old one is answered 410: list again.`,
		Example: `  PEERS=http://127.0.0.1:12379,http://127.0.0.1:22379,http://127.0.0.1:32379
  raftrv backup restore backup --id 1 --cluster $PEERS --data-dir raftrv-1
  raftrv backup restore backup --id 2 --cluster $PEERS --data-dir raftrv-2
  raftrv backup restore backup --id 3 --cluster $PEERS --data-dir raftrv-3`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cmp.Or(cfg.validate(), cfg.checkSelf()); err != nil {
				return err
			}
			syscall.Umask(0o077)
			b, err := store.ReadBackup(args[0])
			if err != nil {
				return err
			}
			before, keys := b.State.RV, b.State.Items.Len()
			if err := restoreBackup(cfg, b, above, zap.NewNop()); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "restored %d keys into %s, node %d of a new cluster (the backup is of cluster %s)\n", keys, cfg.dataDir, cfg.id, b.Cluster)
			fmt.Fprintf(out, "the resource version is %d, in the backup it was %d\n", b.State.RV, before)
			fmt.Fprintf(out, "when all nodes are restored from this file, start each:\n  %s\n", serveCommand(cfg.id, cfg.cluster, cfg.token, cfg.dataDir))
			return nil
		},
	}
	addServeFlags(cmd.Flags(), &cfg, "id", "cluster", "cluster-token", "data-dir")
	cmd.Flags().Uint64Var(&above, "versions-above", 0, versionsAboveUsage)
	return cmd
}

// addServeFlags adds some of the flags of serve.
func addServeFlags(flags *pflag.FlagSet, cfg *config, names ...string) {
	all := pflag.NewFlagSet("", pflag.ContinueOnError)
	cfg.flags(all)
	flags.SortFlags = false
	for _, name := range names {
		flags.AddFlag(all.Lookup(name))
	}
}

// serveCommand returns the command that starts a node with its data.
func serveCommand(id uint64, cluster, token, dataDir string) string {
	command := fmt.Sprintf("raftrv --id %d --cluster %s", id, cluster)
	if token != "" {
		command += " --cluster-token " + token
	}
	return command + " --data-dir " + dataDir
}

const versionsAboveUsage = "go on above this resource `version`, if they would not by themselves; the same for all nodes"

func newRecoverCommand() *cobra.Command {
	var from, to string
	var id, above uint64
	var damaged bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Start over from one node of a cluster that has lost its majority for good",
		Long: `Start over from one node of a cluster that has lost its majority for good. It
makes a new cluster of one node from what --data-dir holds, in a directory of its
own; the old one stays as it is. Stop all nodes of the old cluster first.

Writes that were acknowledged may be missing: a majority had them, which need not
have been this node. Recover from the node whose last entry has the highest term,
and of these the highest index; restore a backup instead if that is newer.

The new cluster has another cluster ID, and its resource versions go on far above
the old ones. The other nodes join it with new IDs and empty directories.`,
		Example: "  raftrv recover --data-dir raftrv-1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == "" {
				return errors.New("--data-dir is missing: the directory of the node to recover from")
			}
			if to == "" {
				to = filepath.Clean(from) + "-recovered"
			}
			syscall.Umask(0o077)
			r, err := recoverDirectory(from, to, id, above, damaged, zap.NewNop())
			if err != nil {
				return err
			}
			return r.print(cmd.OutOrStdout(), from, to)
		},
	}
	cmd.Flags().StringVar(&from, "data-dir", "", "`directory` of the node to recover from")
	cmd.Flags().StringVar(&to, "to", "", "`directory` to make, empty or missing (default that of --data-dir with -recovered)")
	cmd.Flags().Uint64Var(&id, "id", 0, "`number` of the node in the new cluster (default the one it has)")
	cmd.Flags().Uint64Var(&above, "versions-above", 0, versionsAboveUsage)
	cmd.Flags().BoolVar(&damaged, "damaged", false, "take what can be read of a directory that is refused as damaged; a copy of it must fit on the disk meanwhile")
	return cmd
}

func (r *recovery) print(w io.Writer, from, to string) error {
	var lost []string
	for _, m := range r.lost {
		lost = append(lost, fmt.Sprintf("%d (%s)", m.ID, m.PeerURL))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "made %s: node %d of the new cluster %x, its only member\n", to, r.self.ID, r.made.Cluster)
	fmt.Fprintf(&b, "the resource version is %d, this node had reached %d\n\n", r.after, r.before)
	fmt.Fprintf(&b, "This is what node %d had: entries up to %d of term %d, the newest from %s.\n",
		r.old.Member, r.index, r.term, r.newest.Format(time.RFC3339))
	if r.index > r.commit {
		fmt.Fprintf(&b, "It did not know yet that those after %d were committed; they are kept, as they may have been acknowledged.\n", r.commit)
	}
	if r.unreadable != nil {
		fmt.Fprintf(&b, "The last %d entries of its log are left behind, since this program (%s) cannot apply the first of them: %v. "+
			"If a newer version can, use that one and delete %s.\n", r.left, version, r.unreadable, to)
	}
	if r.damage != nil {
		what, _, _ := strings.Cut(r.damage.Error(), adviceForDamage) // which was followed up to here
		fmt.Fprintf(&b, "More is missing, since the directory is damaged: %s.\n", strings.TrimRight(what, ":; "))
	}
	if len(lost) > 0 {
		fmt.Fprintf(&b, "Writes that were acknowledged after that by the lost members, %s, are missing. Nobody can tell from here how many.\n", strings.Join(lost, ", "))
	}
	fmt.Fprintf(&b, "%s stays as it is. Never start a node with it again.\n\n", from)
	fmt.Fprintf(&b, "Start this node, with --listen or --port as before:\n  %s\n",
		serveCommand(r.self.ID, fmt.Sprintf("%d=%s", r.self.ID, r.self.PeerURL), "", to))
	if len(lost) > 0 {
		fmt.Fprintf(&b, "Then add the others again, with new IDs (these are never used again), empty directories and --join:\n"+
			"  curl -X POST -d PEER-URL http://NODE/NEW-ID\n"+
			"  raftrv --id NEW-ID --join --cluster %d=%s,NEW-ID=PEER-URL --data-dir EMPTY\n", r.self.ID, r.self.PeerURL)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
