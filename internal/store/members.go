package store

import (
	"fmt"
	"net/url"
)

const memberURLMax = 1 << 10 // bytes

// Check says whether all that is known of a member can be used as what it is.
// Some of it may be missing.
func (m *Member) Check() error {
	if m.ID == 0 {
		return fmt.Errorf("%w: a member without ID", ErrMalformed)
	}
	for _, s := range []string{m.PeerURL, m.ClientURL} {
		if s == "" {
			continue
		}
		if len(s) > memberURLMax {
			return fmt.Errorf("%w: a URL of %d bytes", ErrMalformed, len(s))
		}
		if u, err := url.Parse(s); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return fmt.Errorf("%w: URL %q", ErrMalformed, s)
		}
	}
	return nil
}
