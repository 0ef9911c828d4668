// Package storetest makes states for the tests of other rooms.
//
// [Apply] applies commands as a replica would, each as an entry of its own;
// [SomeState] has some of everything. Only tests import it.
package storetest
