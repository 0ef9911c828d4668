package httpapi

import (
	"crypto/sha256"
	"encoding/base64"
	"hash"
	"io"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"

	"raftrv/internal/fault"
	"raftrv/internal/shares"
	"raftrv/internal/store"
)

// Headers of a backup. The digest is that of RFC 9530, and comes behind the body.
const (
	HeaderCluster = "Cluster-Id"
	HeaderIndex   = "Raft-Index"
	headerTerm    = "Raft-Term"
	HeaderDigest  = "Repr-Digest"
)

// backupsMax is how many backups there may be at a time. Lists take nothing from them.
const backupsMax = 4

func FormatDigest(h hash.Hash) string {
	return "sha-256=:" + base64.StdEncoding.EncodeToString(h.Sum(nil)) + ":"
}

// getBackup streams a backup.
func (h *httpAPI) getBackup(w http.ResponseWriter, r request) error {
	if err := h.Store.Fresh(r.Context(), r.freshness()); err != nil {
		return err
	}
	busy := fault.ErrTooManyRequests.WithDetail("%d backups are on their way already, or as many to this address as may be; retry later or at another node", backupsMax)
	address := shares.AddressOf(r.RemoteAddr)
	if !h.backups.Take(address, 1) {
		return busy
	}
	defer h.backups.Give(address, 1)
	b, err := h.Store.Backup(r.Context(), r.here())
	if err != nil {
		return busy
	}
	defer b.Close()
	head := store.BackupHead{Format: store.BackupFormat, Cluster: h.Store.Status().ClusterID, Member: h.ID, Time: time.Now().UTC().Truncate(time.Second), Version: h.Version}
	header := w.Header()
	setResourceVersion(header, b.Rest.RV)
	header[HeaderCluster] = []string{head.Cluster}
	header[HeaderIndex] = []string{strconv.FormatUint(b.Rest.Index, 10)}
	header[headerTerm] = []string{strconv.FormatUint(b.Rest.Term, 10)}
	s := newStream(w, r, typeBytes)
	defer s.free()
	if s.isHead {
		return nil
	}
	header["Trailer"] = []string{HeaderDigest}
	digest := sha256.New()
	t := turns{store: h.Store, began: time.Now(), rv: b.Rest.RV}
	if err := b.Encode(io.MultiWriter(s, digest), head, t.rest); err != nil {
		h.Logger.Warn("cut off a backup", zap.Error(err))
		s.abort(http.StatusInternalServerError)
	}
	header[HeaderDigest] = []string{FormatDigest(digest)}
	return nil
}
